"""RTMDet: classification by quality, box regression on feature levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detloss_triton.precision import at_least_float32
from detloss_triton.reduction import rank_means
from detloss_triton.settings import described
from detloss_triton.shapes import check_shapes
from detloss_triton.validate import (
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    NOTHING,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .arguments import constants, precision_of
from .levels import (
    all_levels,
    as_rows,
    boxes_by_level,
    check_labels,
    check_levels,
    check_maps,
    class_loss,
    ignores_labels,
    is_ours,
    is_positive,
    refuse_overrides,
)


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
            (N, k * 4, H, W); labels (N, n) in [0, C], anything where their weight is 0;
            label_weights (N, n);
            bbox_targets (N, n, 4) xyxy; assign_metrics (N, n) quality in [0, 1]; stride (x, y).

        Returns:
            {"loss_cls": [...], "loss_bbox": [...]}, 0-dim per level.

        Raises:
            ValueError: if a level's strides in x and y differ.
            TypeError, ValueError: for an argument that does not fit its level's labels.
            TypeError: for a subclass that overrides a method of OTX's which is not called.
        """
        refuse_overrides(self, "_forward")
        dtype = precision_of(self, cls_score=cls_score, bbox_pred=bbox_pred)
        labels, label_weights, bbox_targets, assign_metrics = constants(
            (labels, label_weights, bbox_targets, assign_metrics), dtype
        )
        check_levels(
            self,
            cls_score=cls_score,
            bbox_pred=bbox_pred,
            labels=labels,
            label_weights=label_weights,
            bbox_targets=bbox_targets,
            assign_metrics=assign_metrics,
            stride=stride,
        )
        n_images, places = check_labels(self, labels)
        for level, rows in enumerate(
            zip(labels, label_weights, bbox_targets, assign_metrics, stride, strict=True)
        ):
            self._check_rows(places[level], n_images, *rows)
            check_maps(
                places[level],
                labels[level],
                cls_score=(cls_score[level], self.cls_out_channels),
                bbox_pred=(bbox_pred[level], 4),
            )
        sizes = [level.shape[1] for level in labels]
        # What is small is joined: an operation on all levels costs what one on a level does.
        metric = all_levels(assign_metrics, dtype)
        is_object = is_positive(torch.cat(list(labels), 1), self.num_classes)
        box_weights = metric.masked_fill(~is_object, 0)
        if enabled():
            check(
                self,
                cls_score=FINITE(cls_score),
                bbox_pred=FINITE(bbox_pred),
                labels=a_class_or_background(self.num_classes, ignores_labels(self.loss_cls))(
                    labels, label_weights
                ),
                label_weights=NOT_NEGATIVE(label_weights),
                assign_metrics=FRACTION(assign_metrics),
                bbox_targets=XYXY(bbox_targets, box_weights.split(sizes, 1)),
            )
            check(self, assign_metrics=NOTHING(assign_metrics, (~is_object).split(sizes, 1)))
        cls_norm, box_norm = rank_means(metric.sum(), box_weights.sum())
        scores = [as_rows(level, self.cls_out_channels) for level in cls_score]
        targets = [(x, at_least_float32(y)) for x, y in zip(labels, assign_metrics, strict=True)]
        return {
            "loss_cls": self._loss_cls(
                scores, targets, all_levels(label_weights, dtype), sizes, cls_norm.clamp(min=1)
            ),
            "loss_bbox": boxes_by_level(
                self.loss_bbox,
                torch.cat([as_rows(level, 4) for level in bbox_pred], 1),
                all_levels(bbox_targets, dtype),
                sizes,
                positive=is_object,
                weight=box_weights,
                norm=box_norm.clamp(min=1),
            ),
        }

    def extra_repr(self) -> str:
        return described(self, loss_cls=is_ours(self.loss_cls), loss_bbox=is_ours(self.loss_bbox))

    def _check_rows(
        self,
        place: str,
        n_images: int,
        labels: Any,
        label_weights: Any,
        bbox_targets: Any,
        assign_metrics: Any,
        stride: Any,
    ) -> None:
        """Raise unless a level's arguments other than predictions fit its labels (N, n)."""
        check_shapes(
            place,
            labels=(labels, (n_images, "n")),
            label_weights=(label_weights, (n_images, "n")),
            bbox_targets=(bbox_targets, (n_images, "n", 4)),
            assign_metrics=(assign_metrics, (n_images, "n")),
        )
        if not isinstance(stride, (Sequence, np.ndarray)) or len(stride) != 2:
            raise ValueError(f"{place}: stride must be a pair (x, y), got {stride!r}")
        if stride[0] != stride[1]:
            raise ValueError(f"{place}: stride must be the same in x and y, got {tuple(stride)}")

    def _loss_cls(
        self,
        scores: Sequence[Tensor],
        targets: Sequence[tuple[Tensor, Tensor]],
        weight: Tensor,
        sizes: Sequence[int],
        norm: Tensor,
    ) -> list[Tensor]:
        ours = is_ours(self.loss_cls)
        # Weights are normalised, not losses: gradients are then right as they are found. A
        # module of another library need not be linear in them.
        weights = (weight / norm if ours else weight).split(sizes, 1)
        losses = [
            class_loss(self.loss_cls, *level, avg_factor=1.0)
            for level in zip(scores, targets, weights, strict=True)
        ]
        return losses if ours else [loss / norm for loss in losses]
