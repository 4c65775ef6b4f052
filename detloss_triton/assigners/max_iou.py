"""The assigner with thresholds of the overlap."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from detloss_triton.ops.max_iou import assign_max_iou
from detloss_triton.shapes import check_numbers
from detloss_triton.targets import check_images, pack

from .assignment import Assignment, Given, check_anchors, check_weights


@dataclass(frozen=True)
class MaxIoUAssigner:
    """Assignment by IoU, of SSD (Liu et al., 2016, https://arxiv.org/abs/1512.02325) and Faster
    R-CNN (Ren et al., 2015, https://arxiv.org/abs/1506.01497).

    An anchor gets the target of its largest IoU, of equals the first, if that is at least
    `pos_iou_thr`. Then a target whose largest IoU is at least `min_pos_iou` is given to the anchor
    of that IoU, of equals the first; of several targets that come to an anchor so, the last stays.
    Background is what got none and whose largest IoU is below `neg_iou_thr`, or all of an image
    without targets; other anchors are ignored.

    Args:
        neg_iou_thr: a number, or two: from the one to below the other.
        min_pos_iou: at 0, a target that overlaps no anchor is given to one, or all, nevertheless.
        gt_max_assign_all: whether of equals each anchor gets the target.
        ignore_iof_thr: an anchor is ignored, and no target's, if more than this part of its area
            lies in an ignored box; -1 for never.

    Raises:
        TypeError, ValueError: for an argument that is no number, or a negative threshold of IoU.
    """

    pos_iou_thr: float
    neg_iou_thr: float | tuple[float, float]
    min_pos_iou: float = 0.0
    gt_max_assign_all: bool = True
    ignore_iof_thr: float = -1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_weights(
            name,
            pos_iou_thr=self.pos_iou_thr,
            **{f"neg_iou_thr[{i}]": x for i, x in enumerate(self._negative)},
            min_pos_iou=self.min_pos_iou,
        )
        if len(self._negative) != 2:
            raise ValueError(f"{name}: neg_iou_thr must be one number or two, got {self._negative}")
        check_numbers(name, ignore_iof_thr=self.ignore_iof_thr)

    @property
    def _negative(self) -> tuple[float, ...]:
        given = self.neg_iou_thr
        return tuple(given) if isinstance(given, (tuple, list)) else (0.0, given)

    def __call__(
        self,
        anchors: Tensor,
        targets: Given,
        inside: Tensor | None = None,
        ignored: Given | None = None,
    ) -> Assignment:
        """Assign the targets of every image.

        Args:
            inside: (A,) which anchors may be assigned, see `anchors.inside`, the others being
                ignored; None for all.
            ignored: boxes to ignore in each image, in the form of targets, but for none.

        Shapes:
            anchors: (A, 4) of all images, xyxy in pixels.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes; one of a negative label gets no anchor.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        name = type(self).__name__
        check_anchors(name, anchors, "A", inside)
        packed = pack(targets, name, anchors)
        crowd = () if ignored is None else tuple(pack(ignored, f"{name}, ignored", anchors))
        if crowd:
            check_images(f"{name}, ignored", packed, len(crowd[0]))
        low, high = self._negative
        return Assignment(
            *assign_max_iou(
                anchors,
                inside,
                *packed,
                crowd,
                pos_iou=float(self.pos_iou_thr),
                neg_low=float(low),
                neg_high=float(high),
                min_pos_iou=float(self.min_pos_iou),
                gt_max_assign_all=bool(self.gt_max_assign_all),
                ignore_iof=float(self.ignore_iof_thr),
            )
        )
