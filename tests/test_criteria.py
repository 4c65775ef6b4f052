"""The five dense criteria as a training step uses them. Their numbers: test_golden.py."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case
from machine import environment, needs_gpu
from torch import Tensor, nn
from trees import Unchanged, leaves, mapped, mixed

import detloss_triton as dt
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.bench.batches import STRIDES, Batch, Draw, coder, rtmdet, yolov9
from detloss_triton.criteria.levels import is_ours

over_criteria = pytest.mark.parametrize("name", list(BUILDERS))


def made(batch: Batch, device: torch.device, **kwargs: Any) -> nn.Module:
    """The batch's criterion on the device."""
    return batch.criterion(device, **kwargs)


def step(batch: Batch, device: torch.device, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """({path: loss}, {path: gradient}) of one forward and backward pass."""
    losses = made(batch, device, **kwargs)(**batch.inputs)
    mixed(losses).backward()
    gradients = {path: x.grad for path, x in batch.leaves().items()}
    assert None not in gradients.values()
    return {path: loss.detach() for path, loss in leaves(losses)}, gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of each tensor's largest value; what a half cannot hold counts as 0."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        info = torch.finfo(ours[path].dtype)
        smallest = 0.0 if info.bits > 16 else info.tiny * info.eps
        torch.testing.assert_close(
            ours[path].float(),
            expected.float(),
            rtol=0,
            atol=max(tolerance * largest, smallest),
            msg=lambda m, path=path: f"{path}: {m}",
        )


@over_criteria
def test_inputs_are_left_alone(name: str, backend: str, device: torch.device) -> None:
    batch = BUILDERS[name]().on(device)
    with Unchanged(batch.inputs):
        step(batch, device)


@over_criteria
@pytest.mark.parametrize("positives", [0.1, 0.0])
def test_every_output_is_connected(
    name: str, positives: float, backend: str, device: torch.device
) -> None:
    """Finite losses that require gradients, also where nothing is there to learn from."""
    batch = BUILDERS[name](positives=positives).on(device)
    losses = dict(leaves(made(batch, device)(**batch.inputs)))
    assert losses
    for path, loss in losses.items():
        assert loss.requires_grad, f"{path} is not connected"
        assert loss.isfinite().all(), path
        assert loss.dtype == torch.float32, path
        reached = torch.autograd.grad(
            loss.sum(), list(batch.leaves().values()), retain_graph=True, allow_unused=True
        )
        assert any(gradient is not None for gradient in reached), path
    mixed(losses).backward()
    for path, x in batch.leaves().items():
        assert x.grad is not None, f"{path} has no gradient"
        assert x.grad.isfinite().all(), path
        if positives == 0 and re.search(batch.of_positives, path):
            assert not x.grad.any(), f"{path}: there is nothing to learn from"
    if positives == 0:
        for path, loss in losses.items():
            if any(part in path for part in ("bbox", "centerness", "l1", "loss_df", "loss_iou")):
                assert not loss.any(), f"{path}: there is nothing to learn from"


@over_criteria
def test_learning_reaches_every_positive(name: str, device: torch.device) -> None:
    """The gradients of the criterion's box inputs are those of positives, and none is missing."""
    batch = BUILDERS[name](positives=0.3).on(device)
    step(batch, device)
    inputs = batch.inputs
    for argument, labels, n_classes in (
        ("bbox_pred", inputs.get("labels"), 5),
        ("flatten_bbox_preds", inputs.get("pos_masks"), None),
    ):
        if argument not in inputs:
            continue
        levels = [inputs[argument]] if isinstance(inputs[argument], Tensor) else inputs[argument]
        labels = [labels] if isinstance(labels, Tensor) else labels
        for level, label in zip(levels, labels, strict=True):
            positive = label if label.dtype == torch.bool else label < n_classes
            gradient = level.grad
            if gradient.dim() == 4:
                gradient = gradient.flatten(2).transpose(1, 2)
            learns = gradient.flatten(0, -2).any(-1)
            assert torch.equal(learns, positive.flatten())


@over_criteria
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_no_memory_is_left_unwritten(name: str, backend: str, device: torch.device) -> None:
    losses, gradients = step(BUILDERS[name]().on(device), device)
    assert all(loss.isfinite().all() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_criteria
def test_second_backward_is_bitwise_the_first(
    name: str, backend: str, device: torch.device
) -> None:
    batch = BUILDERS[name]().on(device)
    total = mixed(made(batch, device)(**batch.inputs))
    inputs = list(batch.leaves().values())
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@over_criteria
def test_a_criterion_keeps_no_state(name: str, backend: str, device: torch.device) -> None:
    """The same batch gives the same losses after another one has passed."""
    first, other = BUILDERS[name](0).on(device), BUILDERS[name](1).on(device)
    criterion = made(first, device)
    before = dict(leaves(criterion(**first.inputs)))
    criterion(**other.inputs)
    after = dict(leaves(criterion(**first.inputs)))
    assert all(torch.equal(before[path], after[path]) for path in before)


@over_criteria
@pytest.mark.usefixtures("kernels")
def test_backends_agree(name: str, device: torch.device) -> None:
    """On batches the golden files do not hold: another seed, one image, one class."""
    for settings in ({"seed": 7}, {"images": 1, "classes": 1}, {"images": 3, "positives": 0.6}):
        results = []
        for chosen in ("torch", "triton"):
            with dt.use_backend(chosen):
                results.append(step(BUILDERS[name](**settings).on(device), device))
        (losses, gradients), (expected_losses, expected_gradients) = results
        assert_same(losses, expected_losses, 1e-5)
        assert_same(gradients, expected_gradients, 1e-4)


@over_criteria
def test_images_without_objects(name: str, backend: str, device: torch.device) -> None:
    """One image of the batch has objects, the other has none."""
    batch = BUILDERS[name](positives=0.3)
    inputs = batch.inputs
    if name == "yolov9":
        inputs["targets"][1, :, 0], inputs["targets"][1, :, 1:] = -1, 0
    elif name == "yolox":
        pytest.skip("images are joined in YOLOX's targets")
    else:
        levels = inputs["labels"] if isinstance(inputs["labels"], list) else [inputs["labels"]]
        for labels in levels:
            labels[1] = 5
        if name == "ssd":
            inputs["bbox_weights"][1] = 0
    batch = batch.on(device)
    _, gradients = step(batch, device)
    for path, gradient in gradients.items():
        assert gradient.isfinite().all()
        if re.search(batch.of_positives, path):
            assert gradient[0].any()
            assert not gradient[1].any()


@over_criteria
def test_a_batch_of_no_images(name: str, backend: str, device: torch.device) -> None:
    batch = BUILDERS[name](images=2, positives=0.0)
    kept = ("avg_factor", "num_total_samples", "num_pos", "stride")
    inputs = {
        key: value if key in kept else mapped(lambda path, x: x[:0], value)
        for key, value in batch.inputs.items()
    }
    batch = dataclasses.replace(batch, inputs=inputs).on(device)
    losses = made(batch, device)(**batch.inputs)
    assert all(loss.isfinite().all() for _, loss in leaves(losses))
    if any(True for _ in leaves(losses)):
        mixed(losses).backward()


@over_criteria
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_float32(
    name: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Of any argument in half precision: weights, targets and anchors as of predictions."""
    settings = {"bg_loss_weight": 0.3} if name == "atss" else {}
    losses = []
    for computed in (dtype, torch.float32):
        batch = BUILDERS[name](positives=0.3).on(device)
        inputs = mapped(
            lambda _, x, to=computed: x.detach().to(dtype).to(to) if x.is_floating_point() else x,
            batch.inputs,
        )
        losses.append(dict(leaves(made(batch, device, **settings)(**inputs))))
    assert all(loss.dtype == torch.float32 for loss in losses[0].values())
    assert_same(*losses, 1e-5)


@over_criteria
def test_torch_default_dtype_changes_nothing(name: str, device: torch.device) -> None:
    batches = [BUILDERS[name](positives=0.3).on(device) for _ in range(2)]
    criterion = made(batches[0], device)
    expected = dict(leaves(criterion(**batches[0].inputs)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        losses = dict(leaves(criterion(**batches[1].inputs)))
    finally:
        torch.set_default_dtype(before)
    for path, loss in losses.items():
        assert loss.dtype == torch.float32, path
    assert_same(losses, expected, 0.0)


@over_criteria
def test_losses_can_be_modified_in_place(name: str, backend: str, device: torch.device) -> None:
    """As users do that weigh them, or that add to the first of a list."""
    batches = [BUILDERS[name]().on(device) for _ in range(2)]
    expected = [0.5 * x for _, x in leaves(made(batches[0], device)(**batches[0].inputs))]
    halved = [x.mul_(0.5) for _, x in leaves(made(batches[1], device)(**batches[1].inputs))]
    torch.testing.assert_close(halved, expected)
    for batch, losses in zip(batches, (expected, halved), strict=True):
        total = losses.pop(0).sum()
        for loss in losses:
            total += loss.sum()
        total.backward()
        for path, x in batch.leaves().items():
            torch.testing.assert_close(x.grad, batches[0].leaves()[path].grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_background_predicts_of_boxes_is_not_read(
    value: float, backend: str, device: torch.device
) -> None:
    """Whatever its deltas and centerness are, losses and gradients stay."""
    for name, arguments in (("atss", ("bbox_pred", "centerness")), ("rtmdet", ("bbox_pred",))):
        clean, spoilt = (BUILDERS[name]().on(device) for _ in range(2))
        expected, expected_gradients = step(clean, device)
        with torch.no_grad():
            for argument in arguments:
                for x, labels in zip(spoilt.inputs[argument], clean.inputs["labels"], strict=True):
                    rows = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
                    rows[labels == 5] = value
        losses, gradients = step(spoilt, device)
        assert_same(losses, expected, 0.0)
        assert_same(gradients, expected_gradients, 0.0)


def test_yolov9_without_a_target_column_has_no_loss(backend: str, device: torch.device) -> None:
    batch = yolov9().on(device)
    criterion = made(batch, device)
    inputs = {**batch.inputs, "targets": batch.inputs["targets"][:, :0]}
    assert criterion(**inputs) is None


def test_yolov9_without_the_auxiliary_head(backend: str, device: torch.device) -> None:
    """The auxiliary losses are added to the main ones with `aux_rate`."""
    both, main, aux = (yolov9().on(device) for _ in range(3))
    total, _ = step(both, device, aux_rate=0.5)
    main.inputs["aux_preds"] = None
    aux.inputs["main_preds"], aux.inputs["aux_preds"] = aux.inputs["aux_preds"], None
    (of_main, _), (of_aux, _) = step(main, device), step(aux, device)
    assert_same(total, {k: of_main[k] + 0.5 * of_aux[k] for k in total}, 1e-5)
    mean = (total["loss_cls"] + total["loss_df"] + total["loss_iou"]) / 3
    torch.testing.assert_close(total["total_loss"], mean)


def test_ssd_avg_factor_of_zero_counts_as_one(backend: str, device: torch.device) -> None:
    """As a number and as a tensor."""
    for zero, one in ((0, 1), (torch.tensor(0, device=device), torch.tensor(1, device=device))):
        batches = [BUILDERS["ssd"](positives=0.0).on(device) for _ in range(2)]
        batches[0].inputs["avg_factor"], batches[1].inputs["avg_factor"] = zero, one
        (ours, _), (expected, _) = (step(batch, device) for batch in batches)
        assert_same(ours, expected, 0.0)


def test_ssd_takes_the_hardest_negatives(backend: str, device: torch.device) -> None:
    """Per image all positives and `ratio` times as many of the costliest background anchors."""
    batch = BUILDERS["ssd"](images=3, anchors=60).on(device)
    batch.inputs["labels"][2] = 5
    losses = made(batch, device, neg_pos_ratio=2)(**batch.inputs)["loss_cls"]
    each = F.cross_entropy(
        batch.inputs["cls_score"].transpose(1, 2), batch.inputs["labels"], reduction="none"
    )
    each = (each * batch.inputs["label_weights"]).cpu()
    for image, label in enumerate(batch.inputs["labels"].cpu()):
        is_object = label < 5
        hard = each[image][~is_object].sort(descending=True).values[: 2 * int(is_object.sum())]
        expected = (each[image][is_object].sum() + hard.sum()) / batch.inputs["avg_factor"]
        torch.testing.assert_close(losses[image].cpu(), expected.view(1))


def test_atss_weight_of_background(backend: str, device: torch.device) -> None:
    """`bg_loss_weight` replaces the weight of background only."""
    batch, by_hand = (BUILDERS["atss"]().on(device) for _ in range(2))
    by_hand.inputs["label_weights"] = [
        torch.where(labels == 5, 0.3, weights)
        for labels, weights in zip(
            by_hand.inputs["labels"], by_hand.inputs["label_weights"], strict=True
        )
    ]
    ours, gradients = step(batch, device, bg_loss_weight=0.3)
    expected, expected_gradients = step(by_hand, device)
    assert_same(ours, expected, 1e-6)
    assert_same(gradients, expected_gradients, 1e-6)


def test_atss_with_quality_focal_loss(backend: str, device: torch.device) -> None:
    """`qfl_cfg` is a module or the arguments of one."""
    results = [
        step(BUILDERS["atss"]().on(device), device, use_qfl=True, qfl_cfg=qfl)
        for qfl in (dt.QualityFocalLoss(beta=1.5), {"beta": 1.5})
    ]
    assert_same(results[0][0], results[1][0], 0.0)


class OtherFocal(dt.CrossSigmoidFocalLoss):
    """A stranger's focal loss, written out: takes flat rows, as OTX calls it.

    It is derived from ours for `valid_label_mask`, which OTX passes to nothing else.
    """

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        valid_label_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert pred.dim() == 2 and target.dim() == 1 and weight.shape == target.shape
        assert valid_label_mask.shape == pred.shape
        t = F.one_hot(target, pred.shape[1] + 1)[:, :-1].float()
        p = pred.sigmoid()
        wrong = p * (1 - t) + (1 - p) * t
        balance = 0.25 * t + 0.75 * (1 - t)
        bce = F.binary_cross_entropy_with_logits(pred, t, reduction="none")
        losses = balance * wrong**2 * bce * weight[:, None] * valid_label_mask
        return losses.sum() / avg_factor


class OtherQuality(nn.Module):
    use_sigmoid = True

    def forward(
        self, pred: Tensor, target: tuple[Tensor, Tensor], weight: Tensor, avg_factor: float
    ) -> Tensor:
        label, score = target
        assert pred.dim() == 2 and label.dim() == score.dim() == weight.dim() == 1
        t = F.one_hot(label, pred.shape[1] + 1)[:, :-1] * score[:, None]
        bce = F.binary_cross_entropy_with_logits(pred, t, reduction="none")
        return (((t - pred.sigmoid()) ** 2 * bce).sum(1) * weight).sum() / avg_factor


class OtherGIoU(nn.Module):
    """2 (1 - GIoU), from torchvision's definition."""

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor, avg_factor: float | None = None
    ) -> Tensor:
        assert pred.dim() == 2 and weight.shape == pred.shape[:1]
        low, high = torch.maximum(pred, target), torch.minimum(pred, target)
        inter = (high[:, 2:] - low[:, :2]).clamp(min=0).prod(1)
        hull = (low[:, 2:] - high[:, :2]).clamp(min=0).prod(1).clamp(min=1e-6)
        area = (pred[:, 2:] - pred[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
        union = (area - inter).clamp(min=1e-6)
        losses = 1 - inter / union + (hull - union) / hull
        return 2 * (losses * weight).sum() / (1.0 if avg_factor is None else avg_factor)


class OtherBinary(nn.Module):
    """Summed or averaged binary cross-entropy, of positives only: OTX passes no weight."""

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float = 1.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(pred, target, reduction="sum") / avg_factor


class OtherSquareIoU(nn.Module):
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        low, high = torch.maximum(pred, target), torch.minimum(pred, target)
        inter = (high[:, 2:] - low[:, :2]).clamp(min=0).prod(1)
        area = (pred[:, 2:] - pred[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
        iou = (inter / (area - inter).clamp(min=1e-6)).clamp(min=1e-16)
        return 5 * (1 - iou**2).sum()


class OtherL1(nn.Module):
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs().sum()


class OtherBCELoss(nn.Module):
    """YOLOv9's three slots, as OTX calls them."""

    def forward(self, pred: Tensor, target: Tensor, cls_norm: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(pred, target, reduction="sum") / cls_norm


class OtherBoxLoss(nn.Module):
    def forward(
        self, pred: Tensor, target: Tensor, valid: Tensor, box_norm: Tensor, cls_norm: Tensor
    ) -> Tensor:
        assert valid.dtype == torch.bool and box_norm.shape == (int(valid.sum()),)
        losses = dt.functional.complete_box_iou_loss(
            pred[valid], target[valid], eps=1e-9, differentiate_alpha=True
        )
        return (losses * box_norm).sum() / cls_norm


class OtherDFLoss(nn.Module):
    def __init__(self, vec2box: dt.Vec2Box) -> None:
        super().__init__()
        self.vec2box = vec2box

    def forward(
        self, pred: Tensor, target: Tensor, valid: Tensor, box_norm: Tensor, cls_norm: Tensor
    ) -> Tensor:
        centre = (self.vec2box.anchor_grid / self.vec2box.scaler[:, None]).expand(*valid.shape, 2)
        sides = torch.cat([centre - target[..., :2], target[..., 2:] - centre], -1)[valid]
        left = sides.clamp(0, 14.99).floor().long()
        share = sides.clamp(0, 14.99) - left
        log_p = pred[valid].log_softmax(-1)
        at_left, at_right = (
            log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (left, left + 1)
        )
        losses = -((1 - share) * at_left + share * at_right).mean(-1)
        return (losses * box_norm).sum() / cls_norm


STRANGERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "atss": {"loss_cls": OtherFocal, "loss_bbox": OtherGIoU, "loss_centerness": OtherBinary},
    "rtmdet": {"loss_cls": OtherQuality, "loss_bbox": OtherGIoU},
    "yolox": {
        "loss_cls": OtherBinary,
        "loss_bbox": OtherSquareIoU,
        "loss_obj": OtherBinary,
        "loss_l1": OtherL1,
    },
    "yolov9": {"loss_cls": OtherBCELoss, "loss_iou": OtherBoxLoss, "loss_dfl": OtherDFLoss},
}


@pytest.mark.parametrize(
    ("name", "slots", "backend"),
    [
        *((name, [slot], "torch") for name, slots in STRANGERS.items() for slot in slots),
        *((name, list(slots), "torch") for name, slots in STRANGERS.items()),
        *((name, list(slots), "triton") for name, slots in STRANGERS.items()),
    ],
    indirect=["backend"],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_modules_of_others(name: str, slots: list[str], backend: str, device: torch.device) -> None:
    """A module that knows nothing of this library, in one slot or all, gives the same numbers."""
    ours, theirs = (BUILDERS[name](positives=0.3).on(device) for _ in range(2))
    modules: dict[str, nn.Module] = {}
    for slot in slots:
        kind = STRANGERS[name][slot]
        if kind is OtherDFLoss:
            modules[slot] = OtherDFLoss(dt.Vec2Box(None, (64, 64), list(STRIDES), device))
        else:
            modules[slot] = kind()
    losses, gradients = step(ours, device)
    expected_losses, expected_gradients = step(theirs, device, **modules)
    assert_same(losses, expected_losses, 1e-5)
    assert_same(gradients, expected_gradients, 1e-4)


class Spy(nn.Module):
    """Keeps how it was called, with shapes for tensors, and lets another module answer."""

    use_sigmoid = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((shapes(args), shapes(kwargs)))
        return self.module(*args, **kwargs)


class FocalSpy(dt.CrossSigmoidFocalLoss):
    """Ours, but for a forward of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.spy = Spy(module)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.spy(*args, **kwargs)


def shapes(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape)
    if isinstance(x, dict):
        return {key: shapes(value) for key, value in x.items()}
    return tuple(map(shapes, x)) if isinstance(x, tuple) else x


def spied(
    name: str, device: torch.device, modules: dict[str, nn.Module], **settings: Any
) -> tuple[Batch, list[int], list[int]]:
    """A batch of which `modules` gave the losses and gradients that ours give in their slots.

    Returns it with the rows of each level, and its positives on those levels that have any: the
    last has none.
    """
    ours, theirs = (BUILDERS[name]().on(device) for _ in range(2))
    for batch in (ours, theirs):
        if "labels" in batch.inputs:
            batch.inputs["labels"][-1].fill_(5)
            # To every other module than a focal loss of ours, OTX passes no mask.
            for mask in batch.inputs.get("valid_label_mask", []):
                mask.fill_(1)
    inner = {slot: getattr(spy, "spy", spy).module for slot, spy in modules.items()}
    losses, gradients = step(ours, device, **inner, **settings)
    their_losses, their_gradients = step(theirs, device, **modules, **settings)
    assert_same(losses, their_losses, 1e-5)
    assert_same(gradients, their_gradients, 1e-5)
    labels = ours.inputs.get("labels", [])
    positives = [int((x < 5).sum()) for x in labels]
    return ours, [x.numel() for x in labels], [n for n in positives if n]


def bce(**kwargs: Any) -> dt.CrossEntropyLoss:
    return dt.CrossEntropyLoss(use_sigmoid=True, **kwargs)


def test_atss_calls_modules_as_otx_does(device: torch.device) -> None:
    """Positional weights to classification, no weight to centerness; both avg_factor by name."""
    modules = {
        "loss_cls": Spy(dt.CrossSigmoidFocalLoss()),
        "loss_bbox": Spy(dt.GIoULoss(loss_weight=2.0)),
        "loss_centerness": Spy(bce()),
    }
    batch, rows, positives = spied("atss", device, modules)
    by_count = {"avg_factor": batch.inputs["avg_factor"]}
    assert len(rows) == 3 and len(positives) == 2
    assert modules["loss_cls"].calls == [(((n, 5), (n,), (n,)), by_count) for n in rows]
    assert modules["loss_bbox"].calls == [
        (((n, 4), (n, 4)), {"weight": (n,), "avg_factor": 1.0}) for n in positives
    ]
    assert modules["loss_centerness"].calls == [(((n,), (n,)), by_count) for n in positives]


@pytest.mark.parametrize("qfl", [False, True])
def test_atss_calls_classification_modules_as_otx_does(qfl: bool, device: torch.device) -> None:
    """A mask for what is derived from our focal loss; pairs of labels and qualities for QFL."""
    if qfl:
        spy = Spy(dt.QualityFocalLoss())
        batch, rows, _ = spied("atss", device, {"qfl_cfg": spy}, use_qfl=True)
    else:
        focal = FocalSpy(dt.CrossSigmoidFocalLoss())
        batch, rows, _ = spied("atss", device, {"loss_cls": focal})
        spy = focal.spy
    by_count = {"avg_factor": batch.inputs["avg_factor"]}
    assert spy.calls == [
        (((n, 5), ((n,), (n,)), (n,)), by_count)
        if qfl
        else (((n, 5), (n,), (n,)), {**by_count, "valid_label_mask": (n, 5)})
        for n in rows
    ]


def test_rtmdet_calls_modules_as_otx_does(device: torch.device) -> None:
    modules = {"loss_cls": Spy(dt.QualityFocalLoss()), "loss_bbox": Spy(dt.GIoULoss())}
    _, rows, positives = spied("rtmdet", device, modules)
    assert len(rows) == 3 and len(positives) == 2
    assert modules["loss_cls"].calls == [
        (((n, 5), ((n,), (n,)), (n,)), {"avg_factor": 1.0}) for n in rows
    ]
    assert modules["loss_bbox"].calls == [
        (((n, 4), (n, 4)), {"weight": (n,), "avg_factor": 1.0}) for n in positives
    ]


def test_yolox_calls_modules_as_otx_does(device: torch.device) -> None:
    """Without keyword arguments, and without positives only that of objectness."""
    modules = {
        "loss_cls": Spy(bce(reduction="sum")),
        "loss_bbox": Spy(dt.IoULoss(mode="square", eps=1e-16, reduction="sum", loss_weight=5.0)),
        "loss_obj": Spy(bce(reduction="sum")),
        "loss_l1": Spy(dt.L1Loss(reduction="sum")),
    }
    batch, _, _ = spied("yolox", device, modules)
    n = len(batch.inputs["bbox_targets"])
    features = {"loss_cls": (n, 5), "loss_bbox": (n, 4), "loss_obj": (300, 1), "loss_l1": (n, 4)}
    for slot, shape in features.items():
        assert modules[slot].calls == [((shape, shape), {})], slot
        modules[slot].calls.clear()
    losses, _ = step(BUILDERS["yolox"](positives=0.0).on(device), device, **modules)
    assert [slot for slot in features if modules[slot].calls] == ["loss_obj"]
    assert [slot for slot in features if losses[slot] != 0] == ["loss_obj"]


@pytest.mark.parametrize("name", ["atss", "rtmdet"])
def test_modules_that_take_no_weight(name: str, device: torch.device) -> None:
    """A plain mean is over the positives of a level, and over the same norm as OTX's losses."""

    class MeanL1(nn.Module):
        def forward(self, pred: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
            weights.append(kwargs["weight"])
            means.append((pred - target).abs().mean())
            return means[-1]

    weights: list[Tensor] = []
    means: list[Tensor] = []
    batch = BUILDERS[name](positives=0.3).on(device)
    losses = made(batch, device, loss_bbox=MeanL1())(**batch.inputs)["loss_bbox"]
    norm = torch.cat(weights).sum().clamp(min=1)
    assert len(means) == len(losses)
    for mean, loss in zip(means, losses, strict=True):
        torch.testing.assert_close(loss, mean / norm)


class FlatGIoU(dt.GIoULoss):
    """Derived from ours, with a forward for the rows that OTX passes."""

    def forward(self, pred: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert pred.dim() == target.dim() == 2
        return 2 * super().forward(pred, target, *args, **kwargs)


class TwiceBoxLoss(dt.BoxLoss):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


def test_a_forward_of_ones_own_is_called(device: torch.device) -> None:
    """A subclass runs its forward, whatever it is derived from."""
    for name, slot, module, plain, loss in (
        ("atss", "loss_bbox", FlatGIoU(), dt.GIoULoss(), "loss_bbox"),
        ("rtmdet", "loss_bbox", FlatGIoU(), dt.GIoULoss(), "loss_bbox"),
        ("yolov9", "loss_iou", TwiceBoxLoss(), dt.BoxLoss(), "loss_iou"),
    ):
        results = []
        for chosen in (module, plain):
            batch = BUILDERS[name](positives=0.3).on(device)
            results.append(dict(leaves(made(batch, device, **{slot: chosen})(**batch.inputs))))
        twice, once = results
        for path in (path for path in once if path.startswith(loss)):
            torch.testing.assert_close(twice[path], 2 * once[path])


def test_a_subclass_without_a_forward_runs_fused(device: torch.device) -> None:
    class Named(dt.GIoULoss):
        pass

    assert is_ours(Named()) and is_ours(dt.DFLoss(None)) and is_ours(bce())
    assert not any(map(is_ours, (FlatGIoU(), TwiceBoxLoss(), nn.L1Loss(), F.l1_loss)))


class OtherCoder:
    """A stranger's coder, which takes flat rows only."""

    def decode(self, bboxes: Tensor, pred_bboxes: Tensor) -> Tensor:
        assert bboxes.dim() == pred_bboxes.dim() == 2
        return coder().decode(bboxes, pred_bboxes)


@pytest.mark.parametrize(("name", "settings"), [("atss", {}), ("ssd", {"reg_decoded_bbox": True})])
def test_coders_of_others(
    name: str, settings: dict[str, Any], backend: str, device: torch.device
) -> None:
    ours, theirs = (BUILDERS[name]().on(device) for _ in range(2))
    losses, gradients = step(ours, device, **settings)
    expected_losses, expected_gradients = step(theirs, device, bbox_coder=OtherCoder(), **settings)
    assert_same(losses, expected_losses, 1e-6)
    assert_same(gradients, expected_gradients, 1e-6)


def test_yolov9_takes_reg_max_from_the_module_in_its_slot(
    backend: str, device: torch.device
) -> None:
    """As OTX does, whose criterion hands its own `reg_max` only to the module it makes itself."""
    vec2box = dt.Vec2Box(None, (64, 64), list(STRIDES), device)
    by_slot, by_argument = (yolov9().on(device) for _ in range(2))
    for batch in (by_slot, by_argument):
        for head in ("main_preds", "aux_preds"):
            batch.inputs[head] = [(c, a[:, :4], b) for c, a, b in batch.inputs[head]]
    losses = made(by_slot, device, loss_dfl=dt.DFLoss(vec2box, 4))(**by_slot.inputs)
    expected = made(by_argument, device, reg_max=4)(**by_argument.inputs)
    torch.testing.assert_close(losses["loss_df"], expected["loss_df"])


def test_lists_that_do_not_fit(device: torch.device) -> None:
    for name in ("atss", "rtmdet"):
        batch = BUILDERS[name]().on(device)
        criterion = made(batch, device)
        with pytest.raises(ValueError, match=r"one entry per level.*'labels': 2"):
            criterion(**{**batch.inputs, "labels": batch.inputs["labels"][:2]})
        with pytest.raises(TypeError, match="cls_score must be a list of tensors"):
            criterion(**{**batch.inputs, "cls_score": batch.inputs["cls_score"][0]})
    with pytest.raises(ValueError, match=r"stride must be the same in x and y, got \(8, 16\)"):
        batch = rtmdet().on(device)
        made(batch, device)(**{**batch.inputs, "stride": [(8, 16), (16, 16), (32, 32)]})


def test_arguments_that_do_not_fit(backend: str, device: torch.device) -> None:
    """Shapes: test_shapes.py."""
    batch = yolov9().on(device)
    with pytest.raises(ValueError, match=r"targets must have shape .*got \(2, 4, 4\)"):
        made(batch, device)(**{**batch.inputs, "targets": batch.inputs["targets"][..., :4]})
    with pytest.raises(ValueError, match=r"main_preds must have an entry per level, got 2 for s"):
        made(batch, device)(**{**batch.inputs, "main_preds": batch.inputs["main_preds"][:2]})
    with pytest.raises(ValueError, match="bbox_coder is needed where reg_decoded_bbox is set"):
        dt.SSDCriterion(5, reg_decoded_bbox=True)
    with pytest.raises(ValueError, match="smoothl1_beta must be positive, got 0"):
        dt.SSDCriterion(5, smoothl1_beta=0)


def dense_match(
    anchors: Tensor, target: Tensor, logits: Tensor, boxes: Tensor, topk: int, kind: str
) -> tuple[Tensor, Tensor]:
    """Task-aligned assignment over the full (image, target, anchor) matrices, target by target."""
    n_images, n_anchors, n_classes = logits.shape
    valid = torch.zeros(n_images, n_anchors, dtype=torch.bool)
    scores = torch.zeros(n_images, n_anchors, n_classes + 4)
    loss = {"ciou": "complete_box_iou_loss", "diou": "distance_box_iou_loss", "iou": "iou_loss"}
    for image in range(n_images):
        rows = target[image]
        taken = torch.zeros(n_anchors)
        for row in rows:
            label, box = int(row[0]), row[1:]
            if label < 0:
                continue
            settings = {"mode": "linear", "eps": 0.0} if kind == "iou" else {"eps": 1e-9}
            similarity = 1 - getattr(dt.functional, loss[kind])(
                boxes[image], box.expand(n_anchors, 4), reduction="none", **settings
            )
            similarity = similarity.clamp(0, 1)
            inside = ((anchors > box[:2]) & (anchors < box[2:])).all(1)
            metric = inside * similarity**6 * logits[image, :, label].sigmoid() ** 0.5
            for anchor in metric.topk(topk).indices.tolist():
                if metric[anchor] > taken[anchor]:
                    taken[anchor] = metric[anchor]
                    valid[image, anchor] = True
                    scores[image, anchor] = 0
                    score = metric[anchor] / (metric.max() + 1e-9) * similarity.max()
                    scores[image, anchor, label] = score
                    scores[image, anchor, n_classes:] = box
    return scores, valid


def matching_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchors, targets, logits, boxes) in which targets overlap and predictions come near them."""
    draw = Draw(seed)
    anchors = torch.cat(
        [torch.cartesian_prod(*[torch.arange(0, 96, s) + s / 2] * 2) for s in STRIDES]
    )
    targets = torch.cat([draw.integers(0, 3, 2, 7, 1).float(), draw.boxes(96.0, 2, 7)], -1)
    targets[1, 4:] = torch.tensor([-1.0, 0, 0, 0, 0])
    low, high = targets[:, :, None, 1:].split(2, -1)
    inside = ((anchors > low) & (anchors < high)).all(-1)
    near = (inside * draw.uniform(*inside.shape)).argmax(1)
    boxes = targets[..., 1:].gather(1, near.unsqueeze(-1).expand(-1, -1, 4))
    boxes = boxes + 3 * draw.normal(2, len(anchors), 4)
    return anchors, targets, draw.normal(2, len(anchors), 3), boxes


def assert_matched(
    matcher: dt.BoxMatcher, problem: tuple[Tensor, ...], device: torch.device, kind: str
) -> Tensor:
    anchors, targets, logits, boxes = problem
    found, valid = matcher(targets.to(device), (logits.to(device), boxes.to(device)))
    with dt.use_backend("torch"):
        expected, expected_valid = dense_match(anchors, targets, logits, boxes, matcher.topk, kind)
    assert torch.equal(valid.cpu(), expected_valid)
    scores, boxes = found.cpu().split([3, 4], -1)
    expected_scores, expected_boxes = expected.split([3, 4], -1)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)
    assert torch.equal(boxes[expected_valid], expected_boxes[expected_valid])
    return valid.cpu()


@pytest.mark.parametrize("kind", ["ciou", "diou", "iou"])
@pytest.mark.parametrize("topk", [10, 1, 3])
def test_box_matcher_equals_a_dense_one(
    kind: Any, topk: int, backend: str, device: torch.device
) -> None:
    for seed in range(2):
        problem = matching_problem(seed)
        matcher = dt.BoxMatcher(3, problem[0].to(device), iou=kind, topk=topk)
        assert assert_matched(matcher, problem, device, kind).any()


def test_box_matcher_with_duplicates_and_ties(backend: str, device: torch.device) -> None:
    """Of targets that claim an anchor with equal metrics the first has it; all may be the same."""
    anchors, targets, logits, boxes = matching_problem(3)
    targets[0, 1:3] = targets[0, :1]
    targets[0, 3, 1:], targets[0, 3, 0] = targets[0, 0, 1:], (targets[0, 0, 0] + 1) % 3
    logits[0] = 0.5
    problem = (anchors, targets, logits, boxes)
    matcher = dt.BoxMatcher(3, anchors.to(device))
    assert_matched(matcher, problem, device, "ciou")
    index = targets[..., :1].long().clamp(min=0).expand(-1, -1, len(anchors))
    of_targets = logits.transpose(1, 2).gather(1, index)
    found = matcher.match(boxes.to(device), of_targets.to(device), targets[..., 1:].to(device))
    used = found.used.cpu()
    owners = found.target.cpu()[used]
    first_image = owners[used.nonzero()[:, 0] == 0]
    assert first_image.eq(0).any()
    assert not torch.isin(first_image, torch.tensor([1, 2, 3])).any()
    for image in range(2):
        claimed = found.anchor[image].cpu()[used[image]]
        assert len(claimed.unique()) == len(claimed)
    assert not found.score.cpu()[~used].any()


def test_box_matcher_at_the_limits(backend: str, device: torch.device) -> None:
    """More candidates than anchors, a box no anchor is in, and padding: all finite."""
    anchors, targets, logits, boxes = matching_problem(4)
    few = torch.arange(0, len(anchors), 40)
    targets[0, 0, 1:] = torch.tensor([1.0, 1.0, 2.0, 2.0])
    targets[1] = torch.tensor([-1.0, 0, 0, 0, 0])
    problem = (anchors[few], targets, logits[:, few], boxes[:, few])
    matcher = dt.BoxMatcher(3, anchors[few].to(device), topk=len(few) - 1)
    valid = assert_matched(matcher, problem, device, "ciou")
    assert not valid[1].any()
    wide = dt.BoxMatcher(3, anchors[few].to(device), topk=50)
    assert assert_matched_shape(wide, problem, device)


def assert_matched_shape(
    matcher: dt.BoxMatcher, problem: tuple[Tensor, ...], device: torch.device
) -> bool:
    """The shapes OTX's criterion splits, all finite."""
    anchors, targets, logits, boxes = (x.to(device) for x in problem)
    found, valid = matcher(targets, (logits, boxes))
    assert found.shape == (2, len(anchors), 7)
    assert valid.shape == (2, len(anchors))
    return bool(found.isfinite().all())


def test_box_matcher_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="iou must be 'iou', 'diou' or 'ciou', got 'giou'"):
        dt.BoxMatcher(3, torch.zeros(1, 2), iou="giou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        dt.BoxMatcher(3, torch.zeros(1, 2), topk=0)


LARGE_MATCH = """
import resource, torch
from detloss_triton import BoxMatcher, Vec2Box

torch.set_num_threads(1)
size, images, targets = 640, 8, 1000
anchors = Vec2Box(None, (size, size), [8, 16, 32]).anchor_grid
low = torch.rand(images, targets, 2) * 500
rows = torch.cat([torch.zeros(images, targets, 1), low, low + 20 + torch.rand_like(low) * 100], -1)
boxes = rows[:, torch.arange(len(anchors)) % targets, 1:] + torch.randn(images, len(anchors), 4)
predict = (torch.randn(images, len(anchors), 2), boxes)
matcher = BoxMatcher(2, anchors)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, valid = matcher(rows, predict)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert valid.any()
print(after - before)
"""


@pytest.mark.slow
def test_box_matcher_takes_a_thousand_targets_in_under_2_gib() -> None:
    """Batch 8 at 8,400 anchors: (batch, targets, anchors, 4) alone is 1 GiB, and not the last."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE_MATCH],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 2 * 2**30


@needs_gpu
def test_box_matcher_memory_on_a_gpu() -> None:
    draw = Draw(0)
    anchors = dt.Vec2Box(None, (640, 640), list(STRIDES), "cuda").anchor_grid
    targets = torch.cat([torch.zeros(8, 1000, 1), draw.boxes(640.0, 8, 1000)], -1).cuda()
    boxes = draw.boxes(640.0, 8, len(anchors)).cuda()
    logits = draw.normal(8, len(anchors), 2).cuda()
    matcher = dt.BoxMatcher(2, anchors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matcher(targets, (logits, boxes))
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30


def test_repr_shows_constants_costs_and_how_the_slots_run() -> None:
    focal = dt.CrossSigmoidFocalLoss(gamma=1.5)
    shown = repr(dt.ATSSCriterion(7, dt.DeltaXYWHBBoxCoder(), focal, nn.Identity(), use_qfl=False))
    for part in (
        "num_classes=7",
        "use_qfl=False",
        "bg_loss_weight=-1.0",
        "gamma=1.5",
        "alpha=0.25",
    ):
        assert part in shown
    assert "fused: loss_cls, loss_centerness, bbox_coder" in shown
    assert "called as by OTX: loss_bbox" in shown
    matching = repr(dt.DetrCriterion({"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2}))
    for part in ("'loss_bbox': 5", "'cost_giou': 2.0", "alpha=0.2,", "fused: matcher"):
        assert part in matching
    yolov9 = dt.YOLOv9Criterion(3, dt.Vec2Box(None, (64, 64), [8, 16, 32]))
    assert "fused: vec2box, matcher, loss_cls, loss_dfl, loss_iou" in repr(yolov9)
    yolov9.matcher = lambda target, predict: None
    assert "called as by OTX: vec2box, matcher" in repr(yolov9)
    assert "neg_pos_ratio=3" in repr(dt.SSDCriterion(4))


# Of each a number of a criterion, or of a module in its slots.
NUMBERS = {
    "yolov9": ("cls_rate",),
    "ssd": ("smoothl1_beta",),
    "atss": ("loss_cls", "gamma"),
    "rtmdet": ("loss_cls", "beta"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_a_tensor_that_changes(
    name: str, backend: str, device: torch.device
) -> None:
    batch = case(name).on(device)
    *path, attribute = NUMBERS[name]
    owner = functools.reduce(getattr, path, batch.criterion)
    number = torch.tensor(1.5)
    setattr(owner, attribute, number)
    before, _ = batch.step()
    number.fill_(0.25)
    after, _ = batch.step()
    setattr(owner, attribute, 0.25)
    expected, _ = batch.step()
    assert any(not torch.equal(after[key], before[key]) for key in after)
    for key, loss in expected.items():
        torch.testing.assert_close(after[key], loss)
