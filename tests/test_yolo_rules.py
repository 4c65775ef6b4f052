"""YOLOv9 by rules "yolo": that project's numbers, and each rule where it alone decides."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import assert_same
from machine import TESTS, environment
from synchronisation import NoHostReads
from test_aligned import ALIGNED, computed
from test_alignment import ALIGN, aligned, rows
from test_ops import samples
from torch import Tensor
from whole_cases import batch as whole_batch
from yolo_cases import N_RANDOM, PARTS, Case, by_ours, cases, error

import detloss_triton as dt
from detloss_triton.bench.batches import yolov9

GOLDEN = TESTS / "golden" / "yolo" / "losses.pt"
TOLERANCE = 1e-4


def golden() -> list[tuple[Case, tuple[dict[str, float], dict[str, Tensor]]]]:
    """The batches, and that project's losses and gradients."""
    found = []
    answers = torch.load(GOLDEN, weights_only=True)
    for case, (losses, gradients) in zip(cases(), answers, strict=True):
        whole = {
            name: torch.zeros(n).index_put((index.long(),), values)
            for name, (index, values, n) in gradients.items()
        }
        found.append((case, (losses, whole)))
    return found


@pytest.mark.parametrize(("case", "theirs"), golden(), ids=[case.name for case in cases()])
def test_golden(case: Case, theirs: Any, backend: str, device: torch.device) -> None:
    assert list(theirs[1]) == list(PARTS) and theirs[1]["classes"].any()
    assert error(by_ours(case, device), theirs) < TOLERANCE


@pytest.mark.skipif("YOLO_ROOT" not in os.environ, reason="needs YOLO_ROOT, a copy of that project")
def test_as_the_project_itself(tmp_path: Any) -> None:
    """Where its own loss does not hang on rounding; and the golden file is what it computes."""
    program, path = [sys.executable, TESTS / "yolo_cases.py"], tmp_path / "losses.pt"
    for arguments in ([path], []):
        run = subprocess.run(
            [*program, *arguments], env=environment(), capture_output=True, text=True, timeout=240
        )
        assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    clear = [float(ours) for _, unclear, ours in lines if float(unclear) < TOLERANCE]
    assert len(lines) == N_RANDOM and len(clear) > 0.9 * N_RANDOM
    assert max(clear) < TOLERANCE
    for ours, theirs in zip(torch.load(path), torch.load(GOLDEN), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        for name in PARTS:
            for a, b in zip(ours[1][name], theirs[1][name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_otx_has_other_numbers_there() -> None:
    """All golden batches with targets tell the rules apart, by far more than the tolerance."""
    for case, (theirs, _) in golden()[:3]:
        losses = case.criterion(rules="otx")(case.main, case.targets, case.aux)
        for name, loss in theirs.items():
            assert abs(losses[name] - loss) > 100 * TOLERANCE * loss, (case.name, name)


def found(
    boxes: Tensor | list[Any], anchors: list[Any], targets: Tensor, device: torch.device, **kw: Any
) -> tuple[list[int], list[float]]:
    """(targets, scores) of anchors with these boxes, by the IoU's square unless told otherwise."""
    given = torch.as_tensor(boxes, dtype=torch.float32).to(device)[None]
    logits = torch.as_tensor(kw.pop("logits", torch.zeros(given.shape[1], 2))).float().to(device)
    strides = torch.as_tensor(kw.pop("strides", torch.ones(given.shape[1]))).to(device)
    params = {"iou": "iou", "iou_power": 2.0, "rules": "yolo", "reach": 1000.0, **kw}
    at = torch.tensor(anchors, dtype=torch.float32, device=device)
    of_rules = (strides,) if params["rules"] == "yolo" else ()
    target, score = aligned(given, logits[None], at, targets.to(device), of_rules, **params)
    return target[0].tolist(), score[0].tolist()


def test_a_centre_on_an_edge_is_inside(backend: str, device: torch.device) -> None:
    anchors = [[4, 4], [0, 4], [8, 4], [4, 0], [4, 8], [8.5, 4], [4, -0.5]]
    boxes, targets = [[0, 0, 8, 8]] * 7, rows([0, 0, 0, 8, 8])
    assert found(boxes, anchors, targets, device)[0] == [0, 0, 0, 0, 0, -1, -1]
    assert found(boxes, anchors, targets, device, rules="otx")[0] == [0, -1, -1, -1, -1, -1, -1]


def test_no_side_is_beyond_the_bins(backend: str, device: torch.device) -> None:
    """32 wide: from 17 one side is more than 2 strides of 8 away, and less than 2 of 16."""
    anchors = [[16, 16], [17, 16], [15, 16], [16, 17], [16, 15], [17, 16]]
    boxes, targets = [[0, 0, 32, 32]] * 6, rows([0, 0, 0, 32, 32])
    strides = torch.tensor([8, 8, 8, 8, 8, 16])
    given = {"strides": strides, "reach": 2.0}
    assert found(boxes, anchors, targets, device, **given)[0] == [0, -1, -1, -1, -1, 0]


def test_a_matchers_reach_is_that_of_its_bins() -> None:
    """With 4 bins 2.99 strides, of which the last anchor's right side is 3 away."""
    anchors, targets = torch.tensor([[12, 4], [8, 4], [0, 4]]), rows([0, 0, 0, 24, 8])
    prediction = torch.zeros(1, 3, 1), torch.tensor([[[0.0, 0, 24, 8]] * 3])
    for reg_max, expected in ((4, [True, True, False]), (5, [True] * 3), (2, [True, False, False])):
        settings: Any = {"rules": "yolo", "strides": torch.tensor([8, 8, 8]), "reg_max": reg_max}
        _, valid = dt.BoxMatcher(1, anchors, **settings)(targets, prediction)
        assert valid[0].tolist() == expected, reg_max


def test_a_target_keeps_one_anchor_wherever_it_lies(backend: str, device: torch.device) -> None:
    """The first of the largest metric; none where that is 0; no further one if it keeps some."""
    targets = rows([0, 0, 0, 8, 8], [1, 50, 50, 58, 58], [1, 10, 0, 18, 8])
    boxes = [[0, 0, 8, 4], [0, 0, 8, 6], [0, 0, 8, 6], [30, 30, 38, 38], [10, 0, 18, 7]]
    boxes += [[10, 0, 18, 2]]
    anchors = [[20, 20]] * 5 + [[14, 4]]
    target, score = found(boxes, anchors, targets, device)
    assert target == [-1, 0, -1, -1, -1, 2]
    assert score == pytest.approx([0, 0.75, 0, 0, 0, 0.25], abs=1e-5)
    assert found(boxes, anchors, targets, device, rules="otx")[0] == [-1, -1, -1, -1, -1, 2]


def test_another_target_may_win_the_only_anchor(backend: str, device: torch.device) -> None:
    """Both would have anchor 1, which lies in none; the second overlaps it more."""
    targets = rows([0, 0, 0, 8, 8], [1, 0, 0, 8, 7])
    boxes, anchors = [[0, 0, 1, 1], [0, 0, 8, 7.2]], [[20, 20]] * 2
    target, score = found(boxes, anchors, targets, device)
    assert target == [-1, 1] and score == pytest.approx([0, 7 / 7.2], abs=1e-5)


@pytest.mark.parametrize("rules", ["otx", "yolo"])
def test_whose_an_anchor_is(rules: str, backend: str, device: torch.device) -> None:
    """By the IoU the first target's; by the metric the second's, whose class is more probable."""
    targets = rows([0, 0, 0, 8, 8], [1, 0, 0, 8, 7], [0, 20, 0, 28, 8], [0, 20, 0, 28, 8])
    boxes, anchors = [[0, 0, 8, 7.6], [20, 0, 28, 7]], [[4, 4], [24, 4]]
    given = {"logits": [[-3.0, 3.0], [0.0, 0.0]], "rules": rules}
    # Of equals the first.
    assert found(boxes, anchors, targets, device, **given)[0] == [rules == "otx", 2]


def test_scores_are_of_what_a_target_won(backend: str, device: torch.device) -> None:
    """The first target loses its best anchor, and one that lies outside has its largest IoU."""
    targets = rows([0, 0, 0, 8, 8], [1, 0, 0, 8, 7])
    boxes = [[0, 0, 8, 7.4], [0, 0, 8, 9.5], [0, 0, 8, 12], [0, 0, 8, 8]]
    anchors = [[4, 4], [4, 4], [4, 4], [20, 20]]
    target, score = found(boxes, anchors, targets, device, topk=10)
    best, second = 8 / 9.5, 8 / 12
    assert target == [1, 0, 0, -1]
    expected = [7 / 7.4, best, second**2 / best**2 * best, 0]
    assert score == pytest.approx(expected, abs=1e-5)
    otx = found(boxes, anchors, targets, device, rules="otx", topk=10)[1]
    assert otx[1] == pytest.approx(best**2 / (7.4 / 8) ** 2, abs=1e-5)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_only_so_many_are_kept(topk: int, backend: str, device: torch.device) -> None:
    boxes, anchors = [[0, 0, 8, y] for y in (4, 7, 6, 7)], [[4, 4]] * 4
    target, _ = found(boxes, anchors, rows([0, 0, 0, 8, 8]), device, topk=topk)
    assert [i for i, t in enumerate(target) if t == 0] == sorted([1, 3, 2][:topk])


def test_where_nan_shows(backend: str, device: torch.device) -> None:
    """In the scores of all that it overlaps; it takes a place, but no anchor from another."""
    targets = rows([0, 0, 0, 8, 8], [1, 0, 0, 8, 7], [1, 20, 0, 28, 8])
    boxes = [[0, 0, 8, 8], [0, 0, 8, 7], [20, 0, 28, 8]]
    anchors = [[4, 4], [4, 4], [24, 4]]
    logits = [[0, math.nan], [0, 0], [0, 0]]
    target, score = found(boxes, anchors, targets, device, logits=logits)
    assert target == [0, 1, 2]
    assert [math.isnan(x) for x in score] == [False, True, False]
    # Its best would be a NaN: it keeps none, though anchor 1 lies outside too.
    anchors = [[90, 90], [90, 90], [24, 4]]
    target, score = found(boxes, anchors, targets[:, 1:], device, logits=logits)
    assert target == [-1, -1, 1] and not any(map(math.isnan, score))


def test_a_cpu_looks_only_at_what_overlaps() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 300, 2, generator=generator) * 60
    boxes = torch.cat([low, low + torch.rand(2, 300, 2, generator=generator) * 9 - 1], -1)
    targets = boxes[:, ::25].round().clone()
    # Of the first image's targets few have an anchor inside.
    anchors = (boxes[1, :, :2] + boxes[1, :, 2:]) / 2
    boxes[1, 7, 2] = math.nan
    label = torch.arange(12.0).expand(2, -1).unsqueeze(2) % 3
    params = {"iou": "ciou", "iou_power": 6.0, "class_power": 0.5, "topk": 10, "heads": 1}
    strides = torch.full((300,), 8)
    logits = torch.randn(2, 3, 300, generator=generator)
    logits[0, 1, 9] = math.nan
    given = (logits,), (boxes.mT,), anchors, (), (strides,), torch.cat([label, targets], 2)
    params |= {"rules": "yolo", "reach": 0.5}
    target, score = ALIGN.cpu_form(ALIGN.given(*given, **params))
    expected, expected_score = ALIGN.reference(*given, **params)
    assert torch.equal(target, expected) and (target >= 0).sum() > 10
    torch.testing.assert_close(score, expected_score, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert (
        score[0].gt(0.1).any()
        and score[0].isnan().sum() < 20
        and score[1][target[1] >= 0].isnan().any()
    )


@pytest.mark.parametrize("total", [0.5, 4.0])
def test_losses_are_divided_by_one_at_least(
    total: float, backend: str, device: torch.device
) -> None:
    *_, sample = samples(ALIGNED, 60, device)
    *inputs, anchors, (targets,) = sample.inputs  # type: ignore[misc]
    targets[..., 0] = 1  # else what has no class does not count
    (score,) = inputs[4]  # type: ignore[misc]
    heads = score.view(2, -1)
    inputs[4] = ((heads / heads.sum(1, keepdim=True) * total).view_as(score),)
    by_rules = []
    for rules in ("otx", "yolo"):
        changed = type(sample)((*inputs, anchors, (targets,)), {**sample.params, "rules": rules})
        by_rules.append(computed(changed)[0][:4])  # but for the CIoU
    otx, yolo = by_rules
    torch.testing.assert_close(yolo, otx * min(total, 1.0), rtol=1e-4, atol=0)


def test_alpha_of_the_box_loss_is_a_constant(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 20, 4, generator=generator).to(device)
    target[..., 2:] += target[..., :2]
    start = (target + 0.2 * torch.rand(1, 20, 4, generator=generator).to(device)).detach()
    mask, weight = torch.ones(1, 20, dtype=torch.bool, device=device), torch.ones(20, device=device)
    norm = torch.ones((), device=device)
    by_rules: dict[str, Tensor] = {}
    for rules, eps in (("otx", 1e-9), ("yolo", 1e-7)):
        ours, expected = (start.clone().requires_grad_() for _ in range(2))
        dt.BoxLoss(rules)(ours, target, mask, weight, norm).backward()  # type: ignore[arg-type]
        dt.functional.complete_box_iou_loss(
            expected[0], target[0], "sum", eps, differentiate_alpha=rules == "otx"
        ).backward()
        assert ours.grad is not None and expected.grad is not None
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-6)
        by_rules[rules] = ours.grad
    assert (by_rules["otx"] - by_rules["yolo"]).abs().max() > 1e-3


def test_eps_counts_for_tiny_boxes(backend: str, device: torch.device) -> None:
    """Of an area of 1e-7 half the IoU is left."""
    side = 1e-7**0.5
    for rules, iou in (("otx", 1 / 1.01), ("yolo", 0.5)):
        (target,), (score,) = found(
            [[0, 0, side, side]],
            [[0.0001, 0.0001]],
            rows([0, 0, 0, side, side]),
            device,
            rules=rules,
        )
        assert target == 0 and score == pytest.approx(iou, rel=1e-3)


def test_rows_that_are_not_there(backend: str, device: torch.device) -> None:
    """Background costs as much as with rows of padding; the total is a sum."""
    batch = yolov9(positives=0.0, rules="yolo").on(device)
    criterion = batch.criterion(device)
    padded = criterion(**batch.inputs)
    losses = criterion(**{**batch.inputs, "targets": batch.inputs["targets"][:, :0]})
    assert_same(losses, padded, 0)
    torch.testing.assert_close(losses["total_loss"], losses["loss_cls"])
    assert losses["loss_cls"] > 1 and losses["loss_iou"] == 0


def test_parts_of_others_are_called_with_the_same_numbers(device: torch.device) -> None:
    """One by one; after an update of the anchors, too."""
    batch = yolov9(rules="yolo").on(device)
    for size in (64, 32):
        head = [tuple(x[..., : x.shape[-2] * size // 64, : x.shape[-1] * size // 64] for x in level)
                for level in batch.inputs["main_preds"]]  # fmt: skip
        fused, one_by_one = batch.criterion(device), batch.criterion(device)
        ours = one_by_one.matcher
        one_by_one.separate_anchor = one_by_one.separate_anchor
        for criterion in (fused, one_by_one):
            criterion.vec2box.update((size, size), device)
        losses = one_by_one(head, batch.inputs["targets"])
        assert_same(losses, fused(head, batch.inputs["targets"]), 1e-5)
        assert losses["loss_iou"] > 0 and len(ours.strides) == len(ours.anchors)


def test_rules_are_named_and_agree() -> None:
    batch = yolov9(rules="yolo")
    criterion = batch.criterion("cpu")
    vec2box = criterion.vec2box
    for make in (dt.BoxLoss, lambda rules: dt.BoxMatcher(5, vec2box.anchor_grid, rules=rules)):
        with pytest.raises(ValueError, match="rules must be 'otx' or 'yolo', got 'yolov9'"):
            make("yolov9")
    with pytest.raises(ValueError, match="YOLOv9Criterion: rules must be 'otx' or 'yolo', got ''"):
        dt.YOLOv9Criterion(5, vec2box, rules="")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BoxMatcher: strides must be a tensor, got None"):
        dt.BoxMatcher(5, vec2box.anchor_grid, rules="yolo")
    with pytest.raises(ValueError, match=r"BoxMatcher: strides must have shape \(A\) = \(84\)"):
        dt.BoxMatcher(5, vec2box.anchor_grid, rules="yolo", strides=vec2box.scaler[1:])
    criterion.matcher = dt.BoxMatcher(5, vec2box.anchor_grid)
    with pytest.raises(ValueError, match=r"matcher\.rules must be those .* 'yolo', got 'otx'"):
        criterion(**batch.inputs)
    otx = dt.YOLOv9Criterion(5, vec2box, loss_iou=dt.BoxLoss("yolo"))
    with pytest.raises(ValueError, match=r"loss_iou\.rules must be those .* 'otx', got 'yolo'"):
        otx(**batch.inputs)
    assert "rules='yolo'" in repr(batch.criterion("cpu"))


def test_nothing_is_read_by_the_host(backend: str, device: torch.device) -> None:
    batch = yolov9(rules="yolo").on(device)
    with NoHostReads(device):
        losses = batch.criterion(device)(**batch.inputs)
        losses["total_loss"].backward()


@pytest.mark.parametrize("n", [3, 0])
def test_one_graph(n: int) -> None:
    torch._dynamo.reset()
    loss = dt.YOLOv9Loss(5, rules="yolo")
    case = whole_batch("yolov9", (n, 0), 1)
    case = type(case)(loss, case.inputs)
    losses, gradients = case.step()  # the anchors of the first step
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with dt.use_backend("torch"):
        losses, gradients = case.step()
        ours, our_gradients = case.step(compiled)
    assert_same(ours, losses, 1e-5)
    assert_same(our_gradients, gradients, 1e-4)
    torch._dynamo.reset()
