"""YOLOX, from raw maps to losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detloss_triton.anchors import Size, points
from detloss_triton.assigners import Assignment, SimOTAAssigner
from detloss_triton.assigners.assignment import Given
from detloss_triton.criteria import YOLOXCriterion
from detloss_triton.ops.coding import delta_decode
from detloss_triton.ops.selection import first_set
from detloss_triton.reduction import rank_means
from detloss_triton.targets import pack
from detloss_triton.validate import may_read

from .whole import Maps, PriorLoss, joined, map_sizes

# Keeps the logarithm of a box of no size finite, and sizes below what float32 holds.
_EPS = 1e-8
_DECODE: dict[str, Any] = {"means": (0.0,) * 4, "stds": (1.0,) * 4, "limit": 80.0, "max_shift": 0.0}


class YOLOXLoss(PriorLoss):
    """`YOLOXCriterion` of what `SimOTAAssigner` assigns to the points of each level.

    On a device it is not asked how many anchors got a target, but all they might be are reckoned
    with: `candidate_topk` for each row of the targets.

    Args:
        num_classes: number of object classes C.
        strides: of each level, in pixels.
        assigner: a `SimOTAAssigner`, or what is called as one and gives each target at most
            `candidate_topk` anchors.
        criterion: called as a `YOLOXCriterion`, the default with the L1 loss that YOLOX adds in its
            last epochs if `use_l1`.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float] = (8, 16, 32),
        assigner: Any = None,
        criterion: Any = None,
        use_l1: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.assigner = SimOTAAssigner() if assigner is None else assigner
        if criterion is None:
            criterion = YOLOXCriterion(num_classes, use_l1=use_l1)
        self.criterion = criterion

    def priors(self, sizes: Sequence[Size], device: torch.device) -> Tensor:
        """(A, 4) the centres of all levels' cells."""
        return points(sizes, self.strides, 0.5, device)

    def decoded(self, codes: Tensor, priors: Tensor) -> Tensor:
        """Boxes (N, A, 4) of shifts and logarithms of sizes, from boxes of a cell's size about its
        upper left corner."""
        centres, size = priors.chunk(2, 1)
        cells = torch.cat([centres - size, centres], 1)
        return delta_decode(codes, cells.expand(codes.shape), **_DECODE)

    def forward(
        self,
        cls_score: Maps,
        bbox_pred: Maps,
        objectness: Maps,
        targets: Given,
        priors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the batch, as of `YOLOXCriterion`.

        Args:
            priors: the cells' centres, by default those of the maps' sizes.

        Shapes:
            cls_score: of each level (N, C, H, W) logits.
            bbox_pred: of each level (N, 4, H, W): the centre from the cell's upper left corner,
                and the logarithm of the size, in strides.
            objectness: of each level (N, 1, H, W) logits.
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        maps = {"cls_score": cls_score, "bbox_pred": bbox_pred, "objectness": objectness}
        sizes = map_sizes(self, **maps)
        if priors is None:
            priors = self.priors(sizes, cls_score[0].device)
        logits = joined(self, "cls_score", cls_score, self.num_classes)
        codes = joined(self, "bbox_pred", bbox_pred, 4)
        objects = joined(self, "objectness", objectness, 1).squeeze(2)
        boxes = self.decoded(codes, priors)
        targets = pack(targets, type(self).__name__, boxes)
        found = self.assigner(logits.detach(), objects.detach(), boxes.detach(), priors, targets)
        return self._losses(objects, logits, codes, boxes, found, priors, targets.labels.shape[1])

    if TYPE_CHECKING:
        __call__ = forward

    def _losses(
        self,
        objects: Tensor,
        logits: Tensor,
        codes: Tensor,
        boxes: Tensor,
        found: Assignment,
        priors: Tensor,
        n_targets: int,
    ) -> dict[str, Tensor]:
        has_target = (found.target >= 0).flatten()
        n_positive = has_target.sum()
        n_images, n_anchors = objects.shape
        if may_read(boxes.device):
            n = int(n_positive)
        else:
            n = n_images * min(n_targets * self.assigner.candidate_topk, n_anchors)
        # Rows beyond the last positive hold whatever the last anchor does, and are not read.
        index = first_set(has_target, n=n).clamp(max=max(n_images * n_anchors - 1, 0))
        label, metric = found.label.flatten()[index], found.metric.flatten()[index]
        classes = torch.arange(self.num_classes, device=label.device)
        box = found.box.flatten(0, 1)[index]
        l1_targets = box
        if getattr(self.criterion, "use_l1", True):
            centre, size = priors[index % max(n_anchors, 1)].chunk(2, 1)
            low, high = box.chunk(2, 1)
            shift = ((low + high) / 2 - centre) / size + 0.5
            l1_targets = torch.cat([shift, ((high - low) / size + _EPS).log()], 1)
        (mean_positive,) = rank_means(n_positive)
        losses: dict[str, Tensor] = self.criterion(
            objects,
            logits,
            codes,
            boxes,
            has_target.unsqueeze(1).to(boxes.dtype),
            (label.unsqueeze(1) == classes) * metric.unsqueeze(1),
            box,
            l1_targets,
            mean_positive.clamp(min=1),
            n_positive,
            has_target,
        )
        return losses
