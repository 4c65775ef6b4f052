"""RTMDet: classification by quality, box regression on feature levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.reduction import rank_means
from detloss_triton.validate import (
    FINITE,
    NOT_NEGATIVE,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .levels import as_rows, check_levels, is_positive, run, run_by_level


class RTMDetCriterion(nn.Module):
    """Losses of RTMDet (Lyu et al., 2022, https://arxiv.org/abs/2212.07784).

    Args:
        num_classes: number of object classes C; label C is background.
        loss_cls: module taking (scores, (labels, qualities)), e.g. `QualityFocalLoss`.
        loss_bbox: module comparing boxes xyxy, e.g. `GIoULoss`.
    """

    def __init__(self, num_classes: int, loss_cls: nn.Module, loss_bbox: nn.Module) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_cls = loss_cls
        self.loss_bbox = loss_bbox
        self.use_sigmoid_cls = getattr(loss_cls, "use_sigmoid", True)
        self.cls_out_channels = num_classes if self.use_sigmoid_cls else num_classes + 1

    def forward(
        self,
        cls_score: Sequence[Tensor],
        bbox_pred: Sequence[Tensor],
        labels: Sequence[Tensor],
        label_weights: Sequence[Tensor],
        bbox_targets: Sequence[Tensor],
        assign_metrics: Sequence[Tensor],
        stride: Sequence[Sequence[int]],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Losses of each level. A level without positives has a box loss of 0, still connected.

        Shapes, each a list over levels with n = H * W * k anchors:
            cls_score (N, k * C, H, W) logits; bbox_pred (N, n, 4) decoded xyxy, or
            (N, k * 4, H, W); labels (N, n) in [0, C]; label_weights (N, n);
            bbox_targets (N, n, 4) xyxy; assign_metrics (N, n) quality in [0, 1]; stride (x, y).

        Returns:
            {"loss_cls": [...], "loss_bbox": [...]}, 0-dim per level.

        Raises:
            ValueError: if a level's strides in x and y differ.
        """
        check_levels(
            cls_score=cls_score,
            bbox_pred=bbox_pred,
            labels=labels,
            label_weights=label_weights,
            bbox_targets=bbox_targets,
            assign_metrics=assign_metrics,
            stride=stride,
        )
        for x, y in stride:
            if x != y:
                raise ValueError(f"stride must be the same in x and y, got {(x, y)}")
        sizes = [level.shape[1] for level in labels]
        # What is small is joined: an operation on all levels costs what one on a level does.
        metric = torch.cat(list(assign_metrics), 1)
        is_object = is_positive(torch.cat(list(labels), 1), self.num_classes)
        box_weights = torch.where(is_object, metric, 0)
        if enabled():
            check(
                self,
                cls_score=FINITE(cls_score),
                bbox_pred=FINITE(bbox_pred),
                labels=a_class_or_background(self.num_classes)(labels, label_weights),
                label_weights=NOT_NEGATIVE(label_weights),
                assign_metrics=NOT_NEGATIVE(assign_metrics),
                bbox_targets=XYXY(bbox_targets, box_weights.split(sizes, 1)),
            )
        cls_norm, box_norm = rank_means(metric.sum(), box_weights.sum())
        # Weights are normalised, not losses: gradients are then right as they are found.
        row_weights = torch.cat(list(label_weights), 1) / cls_norm.clamp(min=1)
        return {
            "loss_cls": [
                run(
                    self.loss_cls,
                    as_rows(scores, self.cls_out_channels),
                    (labels[level], assign_metrics[level]),
                    weight=weight,
                    avg_factor=1.0,
                )
                for level, (scores, weight) in enumerate(
                    zip(cls_score, row_weights.split(sizes, 1), strict=True)
                )
            ],
            "loss_bbox": run_by_level(
                self.loss_bbox,
                torch.cat([as_rows(level, 4) for level in bbox_pred], 1),
                *(torch.cat(list(bbox_targets), 1), sizes),
                weight=box_weights / box_norm.clamp(min=1),
                avg_factor=1.0,
            ),
        }
