"""Arguments of every type, length and device: computed with as floats are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detloss_triton as dt
from detloss_triton import functional
from detloss_triton.engine import REGISTRY, RowOp

NUMBERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
ROWS = 12


def whole(x: Tensor) -> Tensor:
    """Small whole numbers, which every type above but bool holds exactly."""
    return (x * 3).round().clamp(0, 7)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("name", sorted(n for n, op in REGISTRY.items() if isinstance(op, RowOp)))
def test_every_operand_of_every_op_may_be_of_any_type(
    name: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Each input in turn, and the weight: what integers hold is what floats of that value hold."""
    op = REGISTRY[name]
    assert isinstance(op, RowOp)
    for sample in op.samples(ROWS, torch.Generator().manual_seed(0)):
        operands: list[Any] = [None if x is None else x.to(device) for x in sample.inputs]
        operands.append(None if sample.weight is None else sample.weight.to(device))
        is_index = [*(spec.index for spec in op.inputs), False]
        for i, x in enumerate(operands):
            if x is None or (is_index[i] and dtype.is_floating_point):
                continue
            stored = (x.clamp(0, 1) if is_index[i] else whole(x)).to(dtype)
            plain = stored.to(torch.int64 if is_index[i] else torch.float32)
            found, expected = (
                op(*changed[:-1], weight=changed[-1], keep=1, **sample.params)
                for changed in ([*operands[:i], new, *operands[i + 1 :]] for new in (stored, plain))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


LABELS = torch.tensor([0, 40, 299, 44, 200])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_labels_are_not_wrapped_by_the_number_of_classes(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """torch compares a uint8 with 300 as with 44."""
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(device)
    labels = LABELS.clamp(max=torch.iinfo(dtype).max).to(device)
    losses: list[tuple[nn.Module, Callable[[Tensor], Any]]] = [
        (dt.CrossEntropyLoss(), lambda y: y),
        (dt.CrossEntropyLoss(use_sigmoid=True), lambda y: y),
        (dt.CrossEntropyLoss(use_sigmoid=True, reduction="none"), lambda y: y),
        (dt.CrossEntropyLoss(class_weight=[float(c) for c in range(300)]), lambda y: y),
        (dt.CrossSigmoidFocalLoss(), lambda y: y),
        (dt.CrossSigmoidFocalLoss(reduction="none"), lambda y: y),
        (dt.QualityFocalLoss(), lambda y: (y, torch.full((5,), 0.5, device=device))),
    ]
    for loss, target in losses:
        loss.to(device)
        assert loss(logits, target(labels.to(dtype))).equal(loss(logits, target(labels)))


def test_an_ignored_label_does_not_wrap(backend: str, device: torch.device) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.tensor([255, 3, 4], dtype=torch.uint8, device=device)
    loss = dt.CrossEntropyLoss(reduction="sum")
    kept = loss(logits, labels, ignore_index=3)
    assert kept.equal(loss(logits[[0, 2]], labels[[0, 2]]))


BOXES = torch.tensor([[0.0, 0, 300, 300], [5, 5, 9, 9]])
OTHERS = torch.tensor([[10.0, 10, 310, 310], [4, 6, 9, 12]])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "loss", [dt.IoULoss(), dt.GIoULoss(), dt.L1Loss(), dt.smooth_l1_loss, dt.IoULoss(linear=True)]
)
def test_boxes_of_integers(
    loss: Any, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Areas of 90,000 do not fit an int16."""
    boxes, others = BOXES.to(device), OTHERS.to(device)
    expected = loss(boxes, others)
    assert loss(boxes, others.to(dtype)).equal(expected)
    assert loss(boxes.to(dtype), others.to(dtype)).equal(expected)
    weight = torch.tensor([[1], [2]], device=device).expand(2, 4)
    assert loss(boxes, others, weight.to(dtype)).equal(loss(boxes, others, weight.float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16])
def test_coders_take_integers(dtype: torch.dtype) -> None:
    anchors, boxes = BOXES[1:], OTHERS[1:]
    for coder, origin in (
        (dt.DeltaXYWHBBoxCoder(), anchors),
        (dt.DistancePointBBoxCoder(), anchors[:, :2]),
    ):
        codes = coder.encode(origin, boxes)
        assert coder.encode(origin.to(dtype), boxes.to(dtype)).equal(codes)
        whole_codes = codes.round()
        assert coder.decode(origin.to(dtype), whole_codes).equal(coder.decode(origin, whole_codes))


def test_a_whole_criterion_with_integer_boxes(backend: str, device: torch.device) -> None:
    criterion, zero = dt.YOLOXCriterion(2), torch.zeros(1, 1, 1, device=device)

    def loss(boxes: Tensor, ones: Tensor) -> dict[str, Tensor]:
        return criterion(
            zero[0],
            zero.expand(1, 1, 2),
            zero.expand(1, 1, 4),
            BOXES[None, :1].to(device),
            ones,
            ones.expand(1, 2),
            boxes,
            boxes,
            ones[0, 0],
            ones[0, 0],
            ones[0] > 0,
        )

    expected = loss(OTHERS[:1].to(device), torch.ones(1, 1, device=device))
    for dtype in (torch.int16, torch.int64):
        found = loss(OTHERS[:1].to(device, dtype), torch.ones(1, 1, dtype=dtype, device=device))
        assert all(found[key].equal(expected[key]) for key in expected)


# --- lengths ---------------------------------------------------------------------------------

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 3, 1])
ANCHORS = torch.rand(6, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0])
VALID = torch.ones(1, 6, dtype=torch.bool)

LENGTHS: list[tuple[str, Callable[[], Any]]] = [
    (f"CrossEntropyLoss: class_weight .* each of 4 scores, got \\({n},\\)",
     lambda n=n, s=s: dt.CrossEntropyLoss(use_sigmoid=s, class_weight=[1.0] * n)(LOGITS, CLASSES))
    for n in (1, 3, 5) for s in (False, True)
]  # fmt: skip
LENGTHS += [
    ("CrossEntropyLoss: label must", lambda: dt.CrossEntropyLoss()(LOGITS, CLASSES[:1])),
    ("CrossEntropyLoss: label must", lambda: dt.CrossEntropyLoss(True)(LOGITS, LOGITS[:, :1])),
    (
        "CrossEntropyLoss: weight must",
        lambda: dt.CrossEntropyLoss()(LOGITS, CLASSES, LOGITS[:1, 0]),
    ),
    ("CrossEntropyLoss: weight must", lambda: dt.CrossEntropyLoss()(LOGITS, CLASSES, LOGITS)),
    (
        "CrossEntropyLoss: weight must",
        lambda: dt.CrossEntropyLoss(True)(LOGITS, CLASSES, LOGITS[:1, 0]),
    ),
    (
        "CrossEntropyLoss: weight must",
        lambda: dt.CrossEntropyLoss(True)(LOGITS, CLASSES, LOGITS[:1]),
    ),
    (
        "CrossSigmoidFocalLoss: weight must",
        lambda: dt.CrossSigmoidFocalLoss()(LOGITS, CLASSES, LOGITS[:1, 0]),
    ),
    (
        "CrossSigmoidFocalLoss: valid_label_mask must",
        lambda: dt.CrossSigmoidFocalLoss()(LOGITS, CLASSES, valid_label_mask=torch.ones(4)),
    ),
    (
        "CrossSigmoidFocalLoss: valid_label_mask must",
        lambda: dt.CrossSigmoidFocalLoss()(LOGITS, CLASSES, valid_label_mask=torch.ones(1, 4)),
    ),
    (
        "QualityFocalLoss: score must",
        lambda: dt.QualityFocalLoss()(LOGITS, (CLASSES, torch.ones(1))),
    ),
    ("QualityFocalLoss: target must", lambda: dt.QualityFocalLoss()(LOGITS, LOGITS[:1])),
    ("QualityFocalLoss: weight must", lambda: dt.QualityFocalLoss()(LOGITS, LOGITS, torch.ones(1))),
    ("GIoULoss: target must", lambda: dt.GIoULoss()(ANCHORS, ANCHORS[:1])),
    ("GIoULoss: pred must", lambda: dt.GIoULoss()(LOGITS[:, :3], LOGITS[:, :3])),
    ("IoULoss: weight must", lambda: dt.IoULoss()(ANCHORS, ANCHORS, torch.ones(1))),
    ("IoULoss: weight must", lambda: dt.IoULoss()(ANCHORS, ANCHORS, torch.ones(1, 4))),
    ("IoULoss: weight must", lambda: dt.IoULoss()(ANCHORS, ANCHORS, torch.ones(6, 1))),
    ("L1Loss: weight must", lambda: dt.L1Loss()(ANCHORS, ANCHORS, torch.ones(6, 1))),
    ("L1Loss: target must", lambda: dt.L1Loss()(ANCHORS, ANCHORS[:, :1])),
    (
        "DeltaXYWHBBoxCoder: bboxes must",
        lambda: dt.DeltaXYWHBBoxCoder().decode(ANCHORS[:1], LOGITS),
    ),
    (
        "DeltaXYWHBBoxCoder: bboxes must",
        lambda: dt.DeltaXYWHBBoxCoder().encode(ANCHORS[:1], ANCHORS),
    ),
    (
        "DistancePointBBoxCoder: points must",
        lambda: dt.DistancePointBBoxCoder().decode(LOGITS[:1, :2], LOGITS),
    ),
    (
        "DistancePointBBoxCoder: points must",
        lambda: dt.DistancePointBBoxCoder().encode(LOGITS[:1, :2], ANCHORS),
    ),
    (
        "BoxLoss: valid_masks must have as many entries set as box_norm has rows, 5, got 6",
        lambda: dt.BoxLoss()(ANCHORS[None], ANCHORS[None], VALID, torch.ones(5), torch.ones(())),
    ),
    (
        "BoxLoss: valid_masks must have as many entries set as box_norm has rows, 7, got 6",
        lambda: dt.BoxLoss()(ANCHORS[None], ANCHORS[None], VALID, torch.ones(7), torch.ones(())),
    ),
    (
        "avg_factor must be one number",
        lambda: dt.L1Loss()(ANCHORS, ANCHORS, None, torch.ones(6)),
    ),
]


@pytest.mark.parametrize(("message", "call"), LENGTHS)
def test_a_wrong_length_is_refused(message: str, call: Callable[[], Any]) -> None:
    """Neither clamped nor broadcast away."""
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_by_row_or_entry() -> None:
    loss, weight = dt.CrossEntropyLoss(use_sigmoid=True), torch.rand(6)
    each = loss(LOGITS, CLASSES, reduction_override="none") * weight.unsqueeze(1)
    for given in (weight, weight.unsqueeze(1), weight.unsqueeze(1).expand(6, 4)):
        torch.testing.assert_close(loss(LOGITS, CLASSES, given, reduction_override="none"), each)


# --- functions: what is wrong is said in the caller's names ---------------------------------

SCORES = torch.rand(6)
GRAD = SCORES.clone().requires_grad_()
ELSEWHERE = torch.zeros(6, 4, device="meta")

FUNCTIONS: list[tuple[str, Callable[[], Any]]] = [
    ("quality_focal_loss: scores must have shape", lambda: functional.quality_focal_loss(
        LOGITS, CLASSES, SCORES[:1])),
    ("quality_focal_loss: labels must hold integers, got torch.float32", lambda:
        functional.quality_focal_loss(LOGITS, SCORES, SCORES)),
    ("varifocal_loss: no gradient is defined for scores", lambda: functional.varifocal_loss(
        LOGITS, CLASSES, GRAD)),
    ("varifocal_loss: labels must have shape", lambda: functional.varifocal_loss(
        LOGITS, CLASSES[:2], SCORES)),
    ("cross_entropy: row_weight must have shape", lambda: functional.cross_entropy(
        LOGITS, CLASSES, row_weight=torch.ones(4))),
    ("cross_entropy: no gradient is defined for row_weight", lambda: functional.cross_entropy(
        LOGITS, CLASSES, row_weight=GRAD)),
    ("binary_cross_entropy_with_logits: targets must have shape", lambda:
        functional.binary_cross_entropy_with_logits(LOGITS, LOGITS[:1])),
    ("sigmoid_focal_loss: no gradient is defined for targets", lambda:
        functional.sigmoid_focal_loss(SCORES, GRAD)),
    ("sigmoid_focal_loss: targets must hold real numbers, got torch.complex64", lambda:
        functional.sigmoid_focal_loss(LOGITS, LOGITS.to(torch.complex64))),
    ("sigmoid_focal_loss: targets must be on cpu as inputs is, got meta", lambda:
        functional.sigmoid_focal_loss(LOGITS, ELSEWHERE)),
    ("distribution_focal_loss: targets must have shape", lambda: functional.distribution_focal_loss(
        LOGITS, SCORES[:3])),
    ("generalized_box_iou_loss: boxes2 must have shape", lambda:
        functional.generalized_box_iou_loss(ANCHORS, ANCHORS[:1])),
    ("distance_box_iou_loss: boxes1 must have shape", lambda: functional.distance_box_iou_loss(
        LOGITS[:, :3], LOGITS[:, :3])),
    ("complete_box_iou_loss: boxes2 must be on cpu", lambda: functional.complete_box_iou_loss(
        ANCHORS, ELSEWHERE)),
    ("iou_loss: boxes2 must have shape", lambda: functional.iou_loss(ANCHORS, ANCHORS[1:])),
    ("l1_loss: weight must have shape", lambda: functional.l1_loss(
        ANCHORS, ANCHORS, weight=SCORES)),
    ("smooth_l1_loss: target must have shape", lambda: functional.smooth_l1_loss(
        ANCHORS, ANCHORS[:, :1])),
    ("linear_sum_assignment: cost must be floating point", lambda:
        functional.linear_sum_assignment(torch.ones(2, 2, dtype=torch.int64))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), FUNCTIONS)
def test_functions_say_what_is_wrong_in_their_own_names(
    message: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cross_entropy: labels must be a tensor, got list"):
        functional.cross_entropy(LOGITS, [0] * 6)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="CrossEntropyLoss: label must be a tensor, got list"):
        dt.CrossEntropyLoss()(LOGITS, [0] * 6)
    with pytest.raises(TypeError, match="avg_factor must be a number, got str"):
        dt.L1Loss()(ANCHORS, ANCHORS, None, "mean")


def test_double_precision_is_refused_by_the_name_of_the_argument(device: torch.device) -> None:
    with dt.use_backend("triton"):
        for message, call in (
            ("generalized_box_iou_loss: boxes2 is torch.float64", lambda x: functional.
             generalized_box_iou_loss(ANCHORS.to(device), x)),
            ("sigmoid_focal_loss: targets is torch.float64", lambda x: functional.
             sigmoid_focal_loss(LOGITS.to(device), x)),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=message):
                call(ANCHORS.double().to(device))


@pytest.mark.parametrize(
    ("loss", "target", "weight"),
    [
        (dt.CrossEntropyLoss(use_sigmoid=True), LOGITS.sigmoid(), LOGITS.abs()),
        (dt.CrossEntropyLoss(), CLASSES, SCORES),
        (dt.QualityFocalLoss(), LOGITS.sigmoid(), SCORES),
        (dt.CrossSigmoidFocalLoss(), CLASSES, SCORES),
        (dt.GIoULoss(), ANCHORS, SCORES),
        (dt.L1Loss(), ANCHORS, SCORES),
    ],
)
def test_modules_detach_targets_and_weights(
    loss: nn.Module, target: Tensor, weight: Tensor, backend: str, device: torch.device
) -> None:
    target, weight = target.to(device), weight.to(device)

    def step(target: Tensor, weight: Tensor, avg_factor: Tensor) -> tuple[Tensor, Tensor]:
        pred = LOGITS.to(device, copy=True).requires_grad_()
        value = loss(pred, target, weight, avg_factor=avg_factor)
        return value, torch.autograd.grad(value, pred)[0]

    plain = step(target, weight, torch.tensor(3.0, device=device))
    live = target.clone().requires_grad_() if target.is_floating_point() else target
    three = torch.tensor(3.0, device=device)
    found = step(live, weight.clone().requires_grad_(), three.requires_grad_())
    assert found[0].equal(plain[0]) and found[1].equal(plain[1])
