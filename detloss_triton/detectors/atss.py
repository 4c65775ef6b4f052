"""ATSS, from raw maps to losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detloss_triton.anchors import Anchors, Size, grid_anchors
from detloss_triton.assigners import ATSSAssigner
from detloss_triton.assigners.assignment import Given
from detloss_triton.coders import DeltaXYWHBBoxCoder
from detloss_triton.criteria import ATSSCriterion
from detloss_triton.losses import CrossEntropyLoss, CrossSigmoidFocalLoss, GIoULoss
from detloss_triton.reduction import rank_means
from detloss_triton.shapes import check_shapes

from .whole import Maps, PriorLoss, map_sizes

STDS = (0.1, 0.1, 0.2, 0.2)
SQUARES = partial(grid_anchors, strides=(8, 16, 32, 64, 128))


class ATSSLoss(PriorLoss):
    """`ATSSCriterion` of what `ATSSAssigner` assigns to the anchors of each level.

    Args:
        num_classes: number of object classes C.
        anchors: called with the maps' (height, width) and `device` it returns `Anchors`; by default
            `grid_anchors`, a square of 8 strides at each position of strides 8 to 128.
        assigner: called as an `ATSSAssigner`, the default with a `topk` of 9.
        criterion: called as an `ATSSCriterion`, the default that of OTX's ATSS.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: Callable[..., Anchors] = SQUARES,
        assigner: Any = None,
        criterion: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.anchors = anchors
        self.assigner = ATSSAssigner(topk=9) if assigner is None else assigner
        if criterion is None:
            criterion = ATSSCriterion(
                num_classes,
                DeltaXYWHBBoxCoder(target_stds=STDS),
                CrossSigmoidFocalLoss(),
                GIoULoss(loss_weight=2.0),
                CrossEntropyLoss(use_sigmoid=True),
            )
        self.criterion = criterion

    def priors(self, sizes: Sequence[Size], device: torch.device) -> Anchors:
        """The anchors of all levels."""
        return self.anchors(sizes, device=device)

    def decoded(self, codes: Tensor, priors: Anchors) -> Tensor:
        """Boxes (N, A, 4) of deltas of the anchors."""
        boxes: Tensor = self.criterion.bbox_coder.decode(priors.boxes, codes)
        return boxes

    def forward(
        self,
        cls_score: Maps,
        bbox_pred: Maps,
        centerness: Maps,
        targets: Given,
        valid_label_mask: Tensor | None = None,
        priors: Anchors | None = None,
    ) -> dict[str, list[Tensor]]:
        """Losses of each level, as of `ATSSCriterion`.

        Args:
            valid_label_mask: 0 for the classes that nobody looked for in an image; None for none.
            priors: the anchors, by default those of the maps' sizes.

        Shapes, with k anchors at a position:
            cls_score: of each level (N, k * C, H, W) logits.
            bbox_pred: of each level (N, k * 4, H, W) deltas of anchors.
            centerness: of each level (N, k, H, W) logits.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes.
            valid_label_mask: (N, C).

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        maps = {"cls_score": cls_score, "bbox_pred": bbox_pred, "centerness": centerness}
        sizes = map_sizes(self, **maps)
        if priors is None:
            priors = self.priors(sizes, cls_score[0].device)
        found = self.assigner(priors, targets)
        has_target = found.target >= 0
        labels = found.label.masked_fill(~has_target, self.num_classes)
        weights = found.metric.new_ones(()).expand(labels.shape)
        if found.ignored is not None:
            weights = weights.masked_fill(found.ignored, 0)
        if valid_label_mask is None:
            mask = found.metric.new_ones(()).expand(*labels.shape, 1)
        else:
            check_shapes(
                type(self).__name__,
                **{"cls_score[0]": (cls_score[0], ("N", "channels", "H", "W"))},
                valid_label_mask=(valid_label_mask, ("N", self.num_classes)),
            )
            mask = valid_label_mask.unsqueeze(1).expand(-1, labels.shape[1], -1)
        (n_positive,) = rank_means(has_target.sum(1).clamp(min=1).sum())
        n = priors.sizes
        losses: dict[str, list[Tensor]] = self.criterion(
            priors.boxes.expand(found.box.shape).split(n, 1),
            cls_score,
            bbox_pred,
            centerness,
            labels.split(n, 1),
            weights.split(n, 1),
            found.box.split(n, 1),
            mask.split(n, 1),
            n_positive,
        )
        return losses

    if TYPE_CHECKING:
        __call__ = forward
