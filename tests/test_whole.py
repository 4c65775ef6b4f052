"""Whole losses: against OTX's heads, kernels against references, compiled, hostile batches."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from cases import CPU, assert_same
from machine import TESTS, environment, needs_triton
from synchronisation import NoHostReads, Transfers
from test_amp import assert_as_in_float32
from torch import Tensor, nn
from trees import Unchanged, mixed
from whole_cases import CLASSES, NAMES, SIZE, batch, loss_of

import detloss_triton as dt
from detloss_triton import anchors, assigners
from detloss_triton import backend as backends
from detloss_triton.bench.launches import Operations

over_losses = pytest.mark.parametrize("name", NAMES)
COUNTS = ((3, 6), (0, 4), (0, 0), (12, 1))
TOLERANCE = 2e-4
# Launches of a step, forward, sum and backward, ours and torch's: one more than reached.
MOST_LAUNCHES = {"atss": 19, "rtmdet": 19, "ssd": 19, "yolox": 45, "yolov9": 17}


@pytest.mark.skipif("OTX_ROOT" not in os.environ, reason="needs OTX_ROOT, the wheel of otx==2.3.0")
def test_losses_and_gradients_are_otx_s() -> None:
    """Behind OTX's own heads; where no assignment hangs on rounding, which few do."""
    run = subprocess.run(
        [sys.executable, TESTS / "otx_whole.py"],
        env=environment(DETLOSS_BACKEND="torch"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    batches = run.stdout.splitlines()
    # Four sets of counts and two seeds each, ATSS's with and without ignored labels.
    assert len(batches) == 4 * 2 * (2 + 1 + 1 + 1)
    clear = [line for line in batches if float(line.split()[-2]) < TOLERANCE]
    assert len(clear) >= 0.9 * len(batches)
    assert not [line for line in clear if not float(line.split()[-1]) <= TOLERANCE]


@over_losses
@pytest.mark.usefixtures("kernels")
def test_kernels_lose_what_the_references_do(name: str, device: torch.device) -> None:
    for counts in ((3, 2), (0, 0)):
        case = batch(name, counts).on(device)
        with dt.use_backend("torch"):
            losses, gradients = case.step()
        with dt.use_backend("triton"):
            ours, our_gradients = case.step()
        assert_same(ours, losses, 1e-5)
        assert_same(our_gradients, gradients, 1e-4)


@over_losses
def test_lists_are_packed_and_nothing_is_written(name: str) -> None:
    """Torchvision's form of the targets, on both of its sides, and with images without a box."""
    for counts in COUNTS:
        case = batch(name, counts)
        packed = case.inputs["targets"]
        listed = dt.targets.unpack(packed)
        losses, gradients = case.step()
        assert all(x.isfinite().all() for x in (*losses.values(), *gradients.values()))
        case.inputs["targets"] = listed
        with Unchanged(case.inputs), dt.validation(True):
            ours, our_gradients = case.step()
        assert_same(ours, losses, 1e-6)
        assert_same(our_gradients, gradients, 1e-5)


@over_losses
def test_no_host_read_and_no_copy_to_the_device(name: str) -> None:
    for counts in ((40,), (2, 0, 3)):
        case = batch(name, counts)
        losses, gradients = case.step()
        with NoHostReads(CPU), dt.use_backend("torch"):
            ours, our_gradients = case.step()
        assert_same(ours, losses, 1e-5)
        assert_same(our_gradients, gradients, 1e-4)
    meta = case.on(torch.device("meta"))
    meta.criterion(**meta.inputs)  # makes the anchors, which are kept
    with Transfers() as transfers:
        mixed(meta.criterion(**meta.inputs)).backward()
    assert transfers.to_device == 0


@needs_triton
@over_losses
def test_a_step_takes_few_launches(name: str) -> None:
    """As many, however many images and boxes there are."""
    for counts in ((2, 0, 3), (12,)):
        meta = batch(name, counts).on(torch.device("meta"))
        meta.criterion(**meta.inputs)
        with backends.record_launches() as launches, Operations() as operations:
            loss = dt.sum_losses(meta.criterion(**meta.inputs))
            torch.autograd.grad(loss, list(meta.leaves().values()))
        assert len(launches) > 5
        assert len(launches) + sum(operations.found.values()) < MOST_LAUNCHES[name], operations


@over_losses
def test_one_graph_and_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    loss = loss_of(name)
    loss(**batch(name).inputs)  # else YOLOv9's anchors change within the graph
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with dt.use_backend("torch"):
        for seed in (0, 1):
            case = batch(name, (2, 0, 3 + seed), seed)
            losses, gradients = case.step()
            ours, our_gradients = case.step(compiled)
            assert_same(ours, losses, 1e-5)
            assert_same(our_gradients, gradients, 1e-4)
    torch._dynamo.reset()


@over_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_under_autocast(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        assert_as_in_float32(batch(name).on(CPU, dtype), CPU, dtype)


@over_losses
def test_hostile_boxes_and_predictions(name: str) -> None:
    """Boxes outside, of no size, equal, larger than the image, of no class; NaN predictions."""
    boxes = torch.tensor(
        [
            [-90.0, -80, -20, -30],
            [30, 30, 30, 30],
            [9, 9, 9, 50],
            [-500, -500, 700, 800],
            [20, 16, 48, 40],
            [20, 16, 48, 40],
            [20, 16, 48, 40],
        ]
    )
    labels = torch.tensor([0, 1, 2, 3, 4, 4, -1])
    case = batch(name, (2, 0))
    case.inputs["targets"] = [
        {"boxes": boxes, "labels": labels},
        {"boxes": torch.empty(0), "labels": torch.empty(0)},
    ]
    losses, gradients = case.step()
    assert all(x.isfinite().all() for x in (*losses.values(), *gradients.values()))
    assert any(x.any() for x in gradients.values())
    first = next(iter(case.leaves().values()))
    with torch.no_grad():
        first[0, 0, 0, 0] = math.nan
    case.step()


@over_losses
def test_padding_beyond_the_counts_is_never_read(name: str) -> None:
    case = batch(name)
    losses, gradients = case.step()
    targets = case.inputs["targets"]
    for count, labels, boxes in zip(targets.counts.tolist(), *targets[:2], strict=True):
        labels[count:], boxes[count:] = 1, torch.tensor([1.0, 1.0, SIZE, SIZE])
    ours, our_gradients = case.step()
    assert_same(ours, losses, 0)
    assert_same(our_gradients, gradients, 0)


@over_losses
def test_images_of_another_size(name: str) -> None:
    """Anchors follow the maps; a loss that has seen others is as one that has not."""
    loss = loss_of(name)
    case = batch(name)
    losses, _ = case.step()
    half = batch(name)
    half.inputs["targets"] = half.criterion.prepare(
        [{"boxes": torch.tensor([[5.0, 5, 30, 20]]), "labels": torch.tensor([1])}] * 3
    )

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach()[..., : -(-x.shape[-2] // 2), :].contiguous().requires_grad_()
        return type(x)(map(cut, x))

    for key in half.inputs.keys() - {"targets"}:
        half.inputs[key] = cut(half.inputs[key])
    if name == "yolov9":  # level 2 has one row: 32 of 32 pixels
        assert half.inputs["main_preds"][2][0].shape[-2:] == (1, 2)
    expected, _ = half.step()
    for _ in range(2):
        assert_same(half.step(loss)[0], expected, 0)
        assert_same(case.step(loss)[0], losses, 0)
    assert not loss.state_dict()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_same(case.step(other)[0], losses, 0)


class Counted(nn.Module):
    """A loss of a user's own, which is called as OTX calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, pred: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        self.rows += len(pred)
        return self.inner(pred, target, **kwargs)


def test_parts_of_the_user_s_own() -> None:
    """Another assigner, other anchors and a criterion with a module of one's own."""
    case = batch("yolox")
    mine = Counted(dt.IoULoss(mode="square", eps=1e-16, reduction="sum", loss_weight=5.0))
    assigner = assigners.SimOTAAssigner(candidate_topk=3)
    criterion = dt.YOLOXCriterion(CLASSES, loss_bbox=mine)
    with NoHostReads(CPU):
        expected = dt.YOLOXLoss(CLASSES, assigner=assigner)(**case.inputs)
    losses = dt.YOLOXLoss(CLASSES, assigner=assigner, criterion=criterion)(**case.inputs)
    assert_same(losses, expected, 1e-5)
    assert 0 < mine.rows <= 5 * 3
    scores, codes = (
        [torch.randn(1, 6 * n, 4, 4, requires_grad=True) for _ in range(2)]
        for n in (CLASSES + 1, 4)
    )
    grid = partial(anchors.grid_anchors, strides=(16, 16), scales=(2, 4), ratios=(0.5, 1, 2))
    target = {"boxes": torch.tensor([[4.0, 4, 40, 30]]), "labels": torch.tensor([2])}
    found = dt.SSDLoss(CLASSES, grid)(scores, codes, [target])
    mixed(found).backward()
    assert all(x.grad is not None and x.grad.any() for x in (scores[0], codes[0]))


class MyCriterion(dt.SSDCriterion):
    """Called with rows of all anchors, as any criterion that is not this library's."""

    def forward(self, cls_score: Any, *args: Any) -> dict[str, list[Tensor]]:
        assert cls_score.shape == (3, 2 * 16 + 3 * 4, CLASSES + 1)
        return super().forward(cls_score, *args)


class MyCoder(dt.DeltaXYWHBBoxCoder):
    def encode(self, bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        return super().encode(bboxes, gt_bboxes)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("decoded", [False, True])
def test_ssd_s_maps_in_place_and_as_rows(decoded: bool, device: torch.device) -> None:
    """A criterion or a coder of the user's own gets what it asks for, and ours the same losses."""
    case = batch("ssd").on(device)
    stds = (0.1, 0.1, 0.2, 0.2)
    coders = [kind(target_stds=stds) for kind in (dt.DeltaXYWHBBoxCoder, MyCoder)]
    found = []
    for kind in (dt.SSDCriterion, MyCriterion):
        for coder in coders:
            criterion = kind(CLASSES, coder, reg_decoded_bbox=decoded)
            loss = dt.SSDLoss(CLASSES, case.criterion.anchors, None, criterion, coder)
            found.append(case.step(loss))
    losses, gradients = found[0]
    assert any(x.any() for key, x in losses.items() if "loss_bbox" in key)
    for ours, our_gradients in found[1:]:
        assert_same(ours, losses, 1e-5)
        assert_same(our_gradients, gradients, 1e-5)


def test_classes_that_nobody_looked_for_teach_nothing() -> None:
    case = batch("atss")
    mask = torch.ones(3, CLASSES)
    mask[1, 2] = 0
    case.inputs["valid_label_mask"] = mask
    _, gradients = case.step()
    of_class = gradients["cls_score.0"].abs().sum((2, 3)) > 0
    assert torch.equal(of_class, mask > 0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("atss", {"cls_score": None}, "ATSSLoss: cls_score must be a list of tensors"),
        ("rtmdet", {"bbox_pred": []}, "RTMDetLoss: all arguments must have one entry per level"),
        (
            "rtmdet",
            {"cls_score": [torch.zeros(3, 4, s, s) for s in (8, 4, 2)]},
            r"level 0: cls_score must have shape \(N, k \* 5, H, W\), got \(3, 4, 8, 8\)",
        ),
        (
            "yolox",
            {"objectness": [torch.zeros(3, 1, s, s) for s in (8, 4, 3)]},
            r"YOLOXLoss, level 2: objectness must have shape .* got \(3, 1, 3, 3\)",
        ),
        (
            "ssd",
            {"bbox_pred": [torch.zeros(3, 8, s, s) for s in (4, 2)]},
            r"SSDLoss, level 1: bbox_pred must have shape \(3, 12, 2, 2\), got \(3, 8, 2, 2\)",
        ),
        ("yolov9", {"main_preds": torch.zeros(1)}, "YOLOv9Criterion: main_preds must be a list"),
        ("yolox", {"targets": [{}]}, r"YOLOXLoss: targets\[0\] must have a tensor 'labels'"),
        ("atss", {"valid_label_mask": torch.ones(3, 4)}, "ATSSLoss: valid_label_mask must have"),
    ],
)
def test_impossible_arguments(name: str, change: dict[str, Any], message: str) -> None:
    case = batch(name)
    with pytest.raises((TypeError, ValueError)) as error:
        case.criterion(**{**case.inputs, **change})
    assert re.search(message, str(error.value)), error.value


def test_the_first_example_of_the_readme() -> None:
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["losses"].keys() == {"loss_cls", "loss_bbox"}
    assert all(x.grad is not None and x.grad.any() for x in names["scores"])
    assert any(x.grad.any() for x in names["distances"])
