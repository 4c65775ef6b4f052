"""Assigners that look at predictions: a target gets as many anchors as its overlaps add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from detloss_triton.ops.dynamic import assign_dynamic
from detloss_triton.shapes import check_counts, check_shapes
from detloss_triton.targets import check_images, pack

from .assignment import Assignment, Given, check_weights


@dataclass(frozen=True)
class SimOTAAssigner:
    """YOLOX's assignment (Ge et al., 2021, https://arxiv.org/abs/2107.08430).

    Candidates are the anchors inside a target or nearer than `center_radius` strides to its centre
    on both axes. Each target bids for max(1, floor(sum of its `candidate_topk` largest IoUs)) of
    them, those of least cost

        cls_weight BCE(sqrt(p_class p_object), one-hot) - iou_weight log(IoU + 1e-7),

    those that are inside it and near its centre before all others. An anchor with several bids gets
    the target of least cost of all. Of equal costs the first anchor or target is taken; a cost that
    is NaN is the highest.

    Raises:
        TypeError, ValueError: for an argument that is no number, or a negative one.
    """

    center_radius: float = 2.5
    candidate_topk: int = 10
    iou_weight: float = 3.0
    cls_weight: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_counts(name, 1, candidate_topk=self.candidate_topk)
        check_weights(
            name,
            center_radius=self.center_radius,
            iou_weight=self.iou_weight,
            cls_weight=self.cls_weight,
        )

    def __call__(
        self, logits: Tensor, objectness: Tensor, boxes: Tensor, points: Tensor, targets: Given
    ) -> Assignment:
        """Assign the targets of every image.

        Shapes:
            logits: (B, A, C). objectness: (B, A), logits too. boxes: (B, A, 4) predicted, xyxy in
                pixels. points: (A, 4) rows [x, y, stride, stride], see `anchors.points`.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes; one of none of the C classes gets no anchor.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        name = type(self).__name__
        check_shapes(name, logits=(logits, ("B", "A", "C")), objectness=(objectness, ("B", "A")))
        return _assigned(
            name,
            (logits, objectness, boxes, points),
            targets,
            cost="simota",
            radius=float(self.center_radius),
            iou_weight=float(self.iou_weight),
            class_weight=float(self.cls_weight),
            topk=int(self.candidate_topk),
        )


@dataclass(frozen=True)
class DynamicSoftLabelAssigner:
    """RTMDet's assignment (Lyu et al., 2022, https://arxiv.org/abs/2212.07784).

    As `SimOTAAssigner`, but that candidates are the anchors inside a target, `topk` IoUs are added
    up, and the cost is, with s = IoU at the label and 0 elsewhere,

        BCE(p, s) |s - p|^2 - iou_weight log(IoU + 1e-7) + 10^(distance - soft_center_radius),

    the distance that of the anchor from the target's centre, in strides.

    Raises:
        TypeError, ValueError: for an argument that is no number, or a negative one.
    """

    soft_center_radius: float = 3.0
    topk: int = 13
    iou_weight: float = 3.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_counts(name, 1, topk=self.topk)
        check_weights(name, soft_center_radius=self.soft_center_radius, iou_weight=self.iou_weight)

    def __call__(self, logits: Tensor, boxes: Tensor, points: Tensor, targets: Given) -> Assignment:
        """Assign the targets of every image; arguments as of `SimOTAAssigner`."""
        return _assigned(
            type(self).__name__,
            (logits, None, boxes, points),
            targets,
            cost="soft_label",
            radius=float(self.soft_center_radius),
            iou_weight=float(self.iou_weight),
            class_weight=1.0,
            topk=int(self.topk),
        )


def _assigned(
    place: str, predicted: tuple[Tensor, Tensor | None, Tensor, Tensor], targets: Given, **cost: Any
) -> Assignment:
    logits, _, boxes, points = predicted
    check_shapes(
        place,
        logits=(logits, ("B", "A", "C")),
        boxes=(boxes, ("B", "A", 4)),
        points=(points, ("A", 4)),
    )
    packed = pack(targets, place, boxes)
    check_images(place, packed, len(boxes))
    return Assignment(*assign_dynamic(*predicted, *packed, **cost))
