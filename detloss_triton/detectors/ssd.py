"""SSD, from raw maps to losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detloss_triton.anchors import Anchors, Size
from detloss_triton.assigners import MaxIoUAssigner
from detloss_triton.assigners.assignment import Given
from detloss_triton.coders import DeltaXYWHBBoxCoder
from detloss_triton.criteria import SSDCriterion
from detloss_triton.criteria.levels import is_ours
from detloss_triton.settings import is_fused
from detloss_triton.shapes import check_shapes
from detloss_triton.targets import check_images, pack

from .whole import Maps, PriorLoss, check_channels, map_sizes

STDS = (0.1, 0.1, 0.2, 0.2)


class SSDLoss(PriorLoss):
    """`SSDCriterion` of what `MaxIoUAssigner` assigns to the anchors.

    Args:
        num_classes: number of object classes C; class C is background.
        anchors: called with the maps' (height, width) and `device` it returns `Anchors`, such as
            `partial(clustered_anchors, strides=..., widths=..., heights=...)`.
        assigner: called as a `MaxIoUAssigner`, the default with thresholds of 0.4 as OTX's SSD.
        criterion: called as an `SSDCriterion`, the default that of OTX's SSD.
        bbox_coder: what encodes the targets' boxes, unless the criterion compares decoded ones.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: Callable[..., Anchors],
        assigner: Any = None,
        criterion: Any = None,
        bbox_coder: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.anchors = anchors
        if assigner is None:
            assigner = MaxIoUAssigner(pos_iou_thr=0.4, neg_iou_thr=0.4, gt_max_assign_all=False)
        self.assigner = assigner
        self.coder = DeltaXYWHBBoxCoder(target_stds=STDS) if bbox_coder is None else bbox_coder
        if criterion is None:
            criterion = SSDCriterion(num_classes, self.coder)
        self.criterion = criterion

    def priors(self, sizes: Sequence[Size], device: torch.device) -> Anchors:
        """The anchors of all levels: of a level those of one shape after those of another, as its
        map holds them."""
        boxes, counts = self.anchors(sizes, device=device)
        levels = zip(boxes.split(counts), sizes, strict=True)
        shapes = [shape for level, (h, w) in levels for shape in level.view(h * w, -1, 4).unbind(1)]
        return Anchors(torch.cat(shapes), counts)

    def rows(self, name: str, maps: Maps, features: int) -> Tensor:
        """Maps (N, k * features, H, W) as rows (N, A, features), one anchor's after another's."""
        check_channels(self, name, maps, features)
        shapes = [shape for level in maps for shape in level.flatten(2).split(features, 1)]
        return torch.cat(shapes, 2).transpose(1, 2)

    def levels(self, name: str, maps: Maps, features: int) -> list[Tensor]:
        """Maps (N, k * features, H, W) as (N, k, H * W, features) of each, where they lie."""
        check_channels(self, name, maps, features)
        sizes = [(level.shape[1] // features, features) for level in maps]
        pairs = zip(maps, sizes, strict=True)
        return [level.flatten(2).unflatten(1, size).transpose(2, 3) for level, size in pairs]

    def decoded(self, codes: Tensor, priors: Anchors) -> Tensor:
        """Boxes (N, A, 4) of deltas of the anchors."""
        boxes: Tensor = self.coder.decode(priors.boxes, codes)
        return boxes

    def forward(
        self, cls_score: Maps, bbox_pred: Maps, targets: Given, priors: Anchors | None = None
    ) -> dict[str, list[Tensor]]:
        """Losses of each image, as of `SSDCriterion`.

        Args:
            priors: the anchors, by default those of the maps' sizes.

        Shapes, with k anchors at a position:
            cls_score: of each level (N, k * (C + 1), H, W) logits.
            bbox_pred: of each level (N, k * 4, H, W) deltas of anchors.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        sizes = map_sizes(self, cls_score=cls_score, bbox_pred=bbox_pred)
        if priors is None:
            priors = self.priors(sizes, cls_score[0].device)
        place = type(self).__name__
        scores = self.levels("cls_score", cls_score, self.num_classes + 1)
        shapes = [level.shape[:3] for level in scores]
        for i, ((n, k, _), size) in enumerate(zip(shapes, sizes, strict=True)):
            check_shapes(f"{place}, level {i}", bbox_pred=(bbox_pred[i], (n, k * 4, *size)))
        rows = len(cls_score[0]), sum(k * n for _, k, n in shapes)
        targets = pack(targets, place, cls_score[0])
        check_images(place, targets, rows[0])
        check_shapes(place, priors=(priors.boxes, (rows[1], 4)))
        found = self.assigner(priors.boxes, targets)
        check_shapes(f"{place}, assigner", label=(found.label, rows), box=(found.box, (*rows, 4)))
        has_target = found.target >= 0
        labels = found.label.masked_fill(~has_target, self.num_classes)
        weights = found.metric.new_ones(()).expand(labels.shape)
        if found.ignored is not None:
            weights = weights.masked_fill(found.ignored, 0)
        number = has_target.sum(1).clamp(min=1).sum()
        in_place = is_ours(self.criterion)
        is_decoded = getattr(self.criterion, "reg_decoded_bbox", False)
        # Of boxes that the criterion does not encode itself, weights say which of them count.
        encodes = in_place and not is_decoded and is_fused(self.coder, "encode")
        boxes, box_weights = found.box, None
        if not encodes:
            # Without a target a box is zeros, and one of no size has no logarithm.
            of_boxes = (boxes[..., 2:] > boxes[..., :2]).all(2, keepdim=True)
            box_weights = of_boxes.to(boxes.dtype).expand(boxes.shape)
            if not is_decoded:
                boxes = self.coder.encode(priors.boxes, torch.where(of_boxes, boxes, priors.boxes))
        of_rows: Any = priors.boxes, labels, weights, boxes, box_weights, number
        losses: dict[str, list[Tensor]]
        if in_place:
            codes = self.levels("bbox_pred", bbox_pred, 4)
            losses = self.criterion.of_levels(
                scores, codes, *of_rows, self.coder if encodes else None
            )
        else:
            logits = self.rows("cls_score", cls_score, self.num_classes + 1)
            losses = self.criterion(logits, self.rows("bbox_pred", bbox_pred, 4), *of_rows)
        return losses

    if TYPE_CHECKING:
        __call__ = forward
