"""RTMDet, from raw maps to losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detloss_triton.anchors import Size, points
from detloss_triton.assigners import DynamicSoftLabelAssigner
from detloss_triton.assigners.assignment import Given
from detloss_triton.coders import DistancePointBBoxCoder
from detloss_triton.criteria import RTMDetCriterion
from detloss_triton.losses import GIoULoss, QualityFocalLoss

from .whole import Maps, PriorLoss, joined, map_sizes


class RTMDetLoss(PriorLoss):
    """`RTMDetCriterion` of what `DynamicSoftLabelAssigner` assigns to the points of each level.

    Args:
        num_classes: number of object classes C.
        strides: of each level, in pixels.
        offset: where a point lies in its cell, in strides.
        assigner: called as a `DynamicSoftLabelAssigner`, the default.
        criterion: called as an `RTMDetCriterion`, the default that of the paper.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float] = (8, 16, 32),
        offset: float = 0.0,
        assigner: Any = None,
        criterion: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.offset = offset
        self.assigner = DynamicSoftLabelAssigner() if assigner is None else assigner
        if criterion is None:
            boxes = GIoULoss(loss_weight=2.0)
            criterion = RTMDetCriterion(num_classes, QualityFocalLoss(), boxes)
        self.criterion = criterion
        self.coder = DistancePointBBoxCoder()

    def priors(self, sizes: Sequence[Size], device: torch.device) -> Tensor:
        """(A, 4) the points of all levels."""
        return points(sizes, self.strides, self.offset, device)

    def decoded(self, codes: Tensor, priors: Tensor) -> Tensor:
        """Boxes (N, A, 4) of distances from the points."""
        return self.coder.decode(priors, codes)

    def forward(
        self, cls_score: Maps, bbox_pred: Maps, targets: Given, priors: Tensor | None = None
    ) -> dict[str, list[Tensor]]:
        """Losses of each level, as of `RTMDetCriterion`.

        Args:
            priors: the points, by default those of the maps' sizes.

        Shapes:
            cls_score: of each level (N, C, H, W) logits.
            bbox_pred: of each level (N, 4, H, W) distances to the sides l, t, r, b in pixels.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        sizes = map_sizes(self, cls_score=cls_score, bbox_pred=bbox_pred)
        if priors is None:
            priors = self.priors(sizes, cls_score[0].device)
        boxes = self.decoded(joined(self, "bbox_pred", bbox_pred, 4), priors)
        # What the assigner reads; the criterion reads the maps.
        maps = [level.detach() for level in cls_score]
        logits = joined(self, "cls_score", maps, self.num_classes)
        found = self.assigner(logits, boxes.detach(), priors, targets)
        labels = found.label.masked_fill(found.target < 0, self.num_classes)
        weights = boxes.new_ones(()).expand(labels.shape)
        n = [height * width for height, width in sizes]
        losses: dict[str, list[Tensor]] = self.criterion(
            cls_score,
            boxes.split(n, 1),
            labels.split(n, 1),
            weights.split(n, 1),
            found.box.split(n, 1),
            found.metric.split(n, 1),
            [(stride, stride) for stride in self.strides],
        )
        return losses

    if TYPE_CHECKING:
        __call__ = forward
