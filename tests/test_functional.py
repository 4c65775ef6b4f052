"""The surface: what is public, in what order arguments come, and what is no tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detloss_triton as dt
from detloss_triton import functional

TENSORS = (
    "inputs", "targets", "labels", "scores", "boxes1", "boxes2",
    "pred", "target", "cost", "n_rows", "n_cols",
)  # fmt: skip
# The parameters that may be given by position, where that is more than the tensors.
OF_OTHERS = {
    "sigmoid_focal_loss": ["inputs", "targets", "alpha", "gamma", "reduction"],
    "generalized_box_iou_loss": ["boxes1", "boxes2", "reduction", "eps"],
    "distance_box_iou_loss": ["boxes1", "boxes2", "reduction", "eps"],
    "complete_box_iou_loss": ["boxes1", "boxes2", "reduction", "eps"],
    "smooth_l1_loss": ["pred", "target", "weight", "reduction", "avg_factor", "beta"],
}

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 2, 3, 1, 0])
SCORES = torch.rand(6, generator=torch.Generator().manual_seed(1))
BOXES = torch.rand(6, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0])
VALID = torch.ones(1, 6, dtype=torch.bool)
ONE = torch.ones(())
VEC2BOX = dt.Vec2Box(None, (16, 24), [8])


def test_dir_shows_the_public_names() -> None:
    shown = [name for name in dir(dt) if not name.startswith("__")]
    assert sorted(shown) == sorted(dt.__all__)
    assert all(hasattr(dt, name) for name in dt.__all__)
    assert "__version__" in dir(dt)
    assert all(hasattr(functional, name) for name in functional.__all__)


@pytest.mark.parametrize("name", functional.__all__)
def test_tensors_come_by_position_and_the_rest_by_name(name: str) -> None:
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = OF_OTHERS.get(name, [p.name for p in parameters if p.name in TENSORS])
    assert by_position == expected


def test_classes_are_weighed_by_their_rows() -> None:
    by_class = torch.tensor([1.0, 2.0, 0.5, 3.0])
    of_row = by_class[LABELS]
    each = functional.cross_entropy(LOGITS, LABELS, row_weight=of_row, reduction="none")
    torch.testing.assert_close(each, F.cross_entropy(LOGITS, LABELS, by_class, reduction="none"))
    total = functional.cross_entropy(LOGITS, LABELS, row_weight=of_row, reduction="sum")
    torch.testing.assert_close(total / of_row.sum(), F.cross_entropy(LOGITS, LABELS, by_class))
    with pytest.raises(TypeError, match="weight"):
        functional.cross_entropy(LOGITS, LABELS, weight=by_class)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        functional.cross_entropy(LOGITS, LABELS, by_class)  # type: ignore[misc]


# A callable, and arguments that it takes, all tensors.
CALLS: list[tuple[Callable[..., Any], dict[str, Tensor]]] = [
    (functional.binary_cross_entropy_with_logits,
     {"inputs": LOGITS, "targets": LOGITS.sigmoid(), "weight": LOGITS.sigmoid()}),
    (functional.sigmoid_focal_loss, {"inputs": LOGITS, "targets": LOGITS.sigmoid()}),
    (functional.quality_focal_loss, {"inputs": LOGITS, "labels": LABELS, "scores": SCORES}),
    (functional.varifocal_loss, {"inputs": LOGITS, "labels": LABELS, "scores": SCORES}),
    (functional.matchability_aware_loss, {"inputs": LOGITS, "labels": LABELS, "scores": SCORES}),
    (functional.iou_aware_loss, {"inputs": LOGITS, "labels": LABELS, "scores": SCORES}),
    (functional.cross_entropy, {"inputs": LOGITS, "labels": LABELS, "row_weight": SCORES}),
    (functional.distribution_focal_loss,
     {"inputs": LOGITS, "targets": SCORES, "weight": SCORES}),
    (functional.iou_loss, {"boxes1": BOXES, "boxes2": BOXES}),
    (functional.generalized_box_iou_loss, {"boxes1": BOXES, "boxes2": BOXES}),
    (functional.distance_box_iou_loss, {"boxes1": BOXES, "boxes2": BOXES}),
    (functional.complete_box_iou_loss, {"boxes1": BOXES, "boxes2": BOXES}),
    (functional.l1_loss, {"pred": BOXES, "target": BOXES, "weight": BOXES}),
    (functional.smooth_l1_loss, {"pred": BOXES, "target": BOXES, "weight": BOXES}),
    (functional.linear_sum_assignment,
     {"cost": LOGITS, "n_rows": torch.tensor(6), "n_cols": torch.tensor(4)}),
    (dt.CrossEntropyLoss(), {"cls_score": LOGITS, "label": LABELS, "weight": SCORES}),
    (dt.CrossEntropyLoss(use_sigmoid=True),
     {"cls_score": LOGITS, "label": LABELS, "weight": SCORES}),
    (dt.CrossSigmoidFocalLoss(),
     {"pred": LOGITS, "targets": LABELS, "weight": SCORES, "valid_label_mask": LOGITS.sigmoid()}),
    (dt.QualityFocalLoss(), {"pred": LOGITS, "target": LOGITS.sigmoid(), "weight": SCORES}),
    (dt.IoULoss(), {"pred": BOXES, "target": BOXES, "weight": SCORES}),
    (dt.GIoULoss(), {"pred": BOXES, "target": BOXES, "weight": SCORES}),
    (dt.L1Loss(), {"pred": BOXES, "target": BOXES, "weight": SCORES}),
    (dt.BCELoss(), {"predicts_cls": LOGITS, "targets_cls": LOGITS.sigmoid(), "cls_norm": ONE}),
    (dt.BoxLoss(),
     {"predicts_bbox": BOXES[None], "targets_bbox": BOXES[None], "valid_masks": VALID,
      "box_norm": SCORES, "cls_norm": ONE}),
    (dt.DFLoss(VEC2BOX, 4),
     {"predicts_anc": torch.zeros(1, 6, 4, 4), "targets_bbox": BOXES[None], "valid_masks": VALID,
      "box_norm": SCORES, "cls_norm": ONE}),
    (dt.DeltaXYWHBBoxCoder().encode, {"bboxes": BOXES, "gt_bboxes": BOXES}),
    (dt.DeltaXYWHBBoxCoder().decode, {"bboxes": BOXES, "pred_bboxes": LOGITS, "weight": SCORES}),
    (dt.DistancePointBBoxCoder().encode, {"points": BOXES[:, :2], "gt_bboxes": BOXES}),
    (dt.DistancePointBBoxCoder().decode,
     {"points": BOXES[:, :2], "pred_bboxes": BOXES, "weight": SCORES}),
]  # fmt: skip
NO_TENSORS = [
    pytest.param(call, arguments, name, id=f"{_name}, {name}")
    for call, arguments in CALLS
    for _name in [getattr(call, "__qualname__", type(call).__name__)]
    for name in arguments
    if name != "cls_norm"
]


@pytest.mark.parametrize(("call", "arguments", "name"), NO_TENSORS)
def test_what_is_no_tensor_is_a_type_error(
    call: Callable[..., Any], arguments: dict[str, Tensor], name: str
) -> None:
    call(**arguments)
    owner = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    place = call.__name__ if owner is None else type(owner).__name__
    with pytest.raises(TypeError, match=f"^{place}: {name} must be a tensor, got ndarray"):
        call(**arguments | {name: arguments[name].numpy()})
    if name not in ("weight", "row_weight", "valid_label_mask", "n_rows", "n_cols"):
        with pytest.raises(TypeError, match=f"^{place}: {name} must be a tensor, got NoneType"):
            call(**arguments | {name: None})


@pytest.mark.parametrize(("call", "arguments", "name"), NO_TENSORS)
def test_another_shape_is_a_value_error(
    call: Callable[..., Any], arguments: dict[str, Tensor], name: str
) -> None:
    with pytest.raises(ValueError, match=r"must have|must be on"):
        call(**arguments | {name: arguments[name].new_zeros((2, 3, 5, 7))})


def test_vec2box_checks_its_levels() -> None:
    level = (torch.zeros(1, 3, 2, 3), torch.zeros(1, 16, 4, 2, 3), torch.zeros(1, 4, 2, 3))
    VEC2BOX([level])
    with pytest.raises(TypeError, match="Vec2Box: level 0: classes must be a tensor, got list"):
        VEC2BOX([(level[0].tolist(), *level[1:])])
    with pytest.raises(ValueError, match=r"Vec2Box: level 0: distances must have shape \(B, 4"):
        VEC2BOX([(*level[:2], level[2][:, :3])])
