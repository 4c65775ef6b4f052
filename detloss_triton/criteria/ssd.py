"""SSD: softmax classification with hard negative mining, smooth L1 boxes, image by image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.gather import hardest
from detloss_triton.ops.distribution import two_bin
from detloss_triton.ops.regression import smooth_l1
from detloss_triton.reduction import EPS32, unbound
from detloss_triton.shapes import check_shapes
from detloss_triton.validate import (
    FINITE,
    NOT_NEGATIVE,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .levels import decoded, is_positive


class SSDCriterion(nn.Module):
    """Losses of SSD (Liu et al., 2016, https://arxiv.org/abs/1512.02325).

    Args:
        num_classes: number of object classes C; label C is background.
        bbox_coder: decodes boxes where `reg_decoded_bbox`.
        neg_pos_ratio: hardest negatives taken per positive, at most.
        reg_decoded_bbox: compare decoded boxes, else deltas.
        smoothl1_beta: where smooth L1 turns linear, > 0.
    """

    def __init__(
        self,
        num_classes: int,
        bbox_coder: Any | None = None,
        neg_pos_ratio: int = 3,
        reg_decoded_bbox: bool = False,
        smoothl1_beta: float = 1.0,
    ) -> None:
        super().__init__()
        if reg_decoded_bbox and bbox_coder is None:
            raise ValueError("bbox_coder is needed where reg_decoded_bbox is set, got None")
        if not smoothl1_beta > 0:
            raise ValueError(f"smoothl1_beta must be positive, got {smoothl1_beta}")
        self.num_classes = num_classes
        self.bbox_coder = bbox_coder
        self.neg_pos_ratio = neg_pos_ratio
        self.reg_decoded_bbox = reg_decoded_bbox
        self.smoothl1_beta = smoothl1_beta

    def forward(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        anchor: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        avg_factor: float | Tensor,
    ) -> dict[str, list[Tensor]]:
        """Losses of each image.

        Args:
            avg_factor: divisor of both losses, usually the number of positives; 0 counts as 1.

        Shapes:
            cls_score (N, A, C + 1) logits; bbox_pred (N, A, 4); anchor (N, A, 4) xyxy;
            labels (N, A) in [0, C]; label_weights (N, A); bbox_targets, bbox_weights (N, A, 4).

        Returns:
            {"loss_cls": N tensors of shape (1,), "loss_bbox": N 0-dim tensors}.

        Raises:
            TypeError, ValueError: for arguments of other shapes.
        """
        check_shapes(
            type(self).__name__,
            cls_score=(cls_score, ("N", "A", self.num_classes + 1)),
            bbox_pred=(bbox_pred, ("N", "A", 4)),
            anchor=(anchor, ("N", "A", 4)),
            labels=(labels, ("N", "A")),
            label_weights=(label_weights, ("N", "A")),
            bbox_targets=(bbox_targets, ("N", "A", 4)),
            bbox_weights=(bbox_weights, ("N", "A", 4)),
        )
        if enabled():
            check(
                self,
                cls_score=FINITE(cls_score),
                bbox_pred=FINITE(bbox_pred),
                anchor=XYXY(anchor),
                labels=a_class_or_background(self.num_classes)(labels, label_weights),
                label_weights=NOT_NEGATIVE(label_weights),
                bbox_weights=NOT_NEGATIVE(bbox_weights),
                bbox_targets=FINITE(bbox_targets, bbox_weights),
                avg_factor=NOT_NEGATIVE(avg_factor),
            )
        if isinstance(avg_factor, Tensor):
            norm: float | Tensor = torch.where(avg_factor == 0, 1, avg_factor)
        else:
            norm = avg_factor or 1.0
        each = two_bin(cls_score, labels, None, None, weight=label_weights, keep=2, few=True)
        loss_cls = self._mined(each, labels) / norm
        if self.reg_decoded_bbox:
            bbox_pred = decoded(self.bbox_coder, anchor, bbox_pred)
        loss_bbox = smooth_l1(
            *(bbox_pred.unsqueeze(-1), bbox_targets.unsqueeze(-1)),
            weight=bbox_weights,
            keep=1,
            beta=self.smoothl1_beta,
        ) / (norm + EPS32)
        return {
            "loss_cls": unbound(loss_cls),
            "loss_bbox": unbound(loss_bbox),
        }

    def _mined(self, each: Tensor, labels: Tensor) -> Tensor:
        """(N, 1): the losses (N, A) of all positives and of the hardest negatives of each image."""
        positive = is_positive(labels, self.num_classes)
        negative = labels == self.num_classes
        n_taken = positive.sum(1, keepdim=True) * self.neg_pos_ratio
        hardness = torch.where(negative, each.detach(), -1.0)
        kept = hardest(hardness, n_taken) & negative
        return torch.where(positive | kept, each, 0).sum(1, keepdim=True)
