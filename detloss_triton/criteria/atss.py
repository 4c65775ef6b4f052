"""ATSS: classification, box regression and centerness on feature levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.boxes import columns
from detloss_triton.losses import CrossEntropyLoss, QualityFocalLoss
from detloss_triton.ops.regression import iou_loss
from detloss_triton.reduction import rank_means
from detloss_triton.validate import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .levels import as_rows, check_levels, decoded, is_positive, run

# The quality of a positive whose box misses its target altogether.
_MIN_QUALITY = 1e-6


class ATSSCriterion(nn.Module):
    """Losses of ATSS (Zhang et al., 2020, https://arxiv.org/abs/1912.02424).

    Args:
        num_classes: number of object classes C; label C is background.
        bbox_coder: decodes boxes, e.g. `DeltaXYWHBBoxCoder`.
        loss_cls, loss_bbox, loss_centerness: modules; centerness defaults to binary cross-entropy.
        use_qfl: classify with quality focal loss, the IoU of the decoded box as the quality.
        qfl_cfg: the module to use then, or the arguments of a `QualityFocalLoss`.
        reg_decoded_bbox: `loss_bbox` compares decoded boxes, else what the coder encodes.
        bg_loss_weight: label weight of background, where not negative.
    """

    def __init__(
        self,
        num_classes: int,
        bbox_coder: Any,
        loss_cls: nn.Module,
        loss_bbox: nn.Module,
        loss_centerness: nn.Module | None = None,
        use_qfl: bool = False,
        qfl_cfg: nn.Module | dict[str, Any] | None = None,
        reg_decoded_bbox: bool = True,
        bg_loss_weight: float = -1.0,
    ) -> None:
        super().__init__()
        if use_qfl:
            if isinstance(qfl_cfg, nn.Module):
                loss_cls = qfl_cfg
            else:
                loss_cls = QualityFocalLoss(**(qfl_cfg or {}))
        self.num_classes = num_classes
        self.bbox_coder = bbox_coder
        self.use_qfl = use_qfl
        self.reg_decoded_bbox = reg_decoded_bbox
        self.bg_loss_weight = bg_loss_weight
        self.loss_bbox = loss_bbox
        self.loss_centerness = loss_centerness or CrossEntropyLoss(use_sigmoid=True)
        self.loss_cls = loss_cls
        self.use_sigmoid_cls = getattr(loss_cls, "use_sigmoid", True)
        self.cls_out_channels = num_classes if self.use_sigmoid_cls else num_classes + 1

    def forward(
        self,
        anchors: Sequence[Tensor],
        cls_score: Sequence[Tensor],
        bbox_pred: Sequence[Tensor],
        centerness: Sequence[Tensor],
        labels: Sequence[Tensor],
        label_weights: Sequence[Tensor],
        bbox_targets: Sequence[Tensor],
        valid_label_mask: Sequence[Tensor],
        avg_factor: float | Tensor,
    ) -> dict[str, list[Tensor]]:
        """Losses of each level. A level without positives has box losses of 0, still connected.

        Args:
            avg_factor: divisor of classification and centerness, usually the number of positives.

        Shapes, each a list over levels with n = H * W * k anchors:
            anchors (N, n, 4) xyxy; cls_score (N, k * C, H, W) logits; bbox_pred (N, k * 4, H, W);
            centerness (N, k, H, W) logits; labels (N, n) in [0, C]; label_weights (N, n);
            bbox_targets (N, n, 4) xyxy; valid_label_mask (N, n, C) or (N, n, 1).

        Returns:
            {"loss_cls": [...], "loss_bbox": [...], "loss_centerness": [...]}, 0-dim per level.
        """
        check_levels(
            anchors=anchors,
            cls_score=cls_score,
            bbox_pred=bbox_pred,
            centerness=centerness,
            labels=labels,
            label_weights=label_weights,
            bbox_targets=bbox_targets,
            valid_label_mask=valid_label_mask,
        )
        positive = [is_positive(level, self.num_classes) for level in labels]
        if enabled():
            check(
                self,
                anchors=XYXY(anchors),
                cls_score=FINITE(cls_score),
                bbox_pred=FINITE(bbox_pred),
                centerness=FINITE(centerness),
                labels=a_class_or_background(self.num_classes)(labels, label_weights),
                label_weights=NOT_NEGATIVE(label_weights),
                bbox_targets=(XYXY if self.reg_decoded_bbox else FINITE)(bbox_targets, positive),
                valid_label_mask=NOT_NEGATIVE(valid_label_mask),
                avg_factor=POSITIVE(avg_factor),
            )
        centred = self._centerness_targets(anchors, bbox_targets, positive)
        (box_norm,) = rank_means(torch.cat([level.flatten() for level in centred]).sum())
        box_norm = box_norm.clamp(min=1)
        losses: dict[str, list[Tensor]] = {"loss_cls": [], "loss_bbox": [], "loss_centerness": []}
        for level, is_object in enumerate(positive):
            # Deltas of background are not looked at, so that whatever they hold, its gradient is 0.
            boxes = torch.where(is_object.unsqueeze(-1), as_rows(bbox_pred[level], 4), 0)
            if self.reg_decoded_bbox:
                boxes = decoded(self.bbox_coder, anchors[level], boxes)
            weights = label_weights[level]
            if self.bg_loss_weight >= 0:
                is_background = labels[level] == self.num_classes
                weights = torch.where(is_background, self.bg_loss_weight, weights)
            losses["loss_cls"].append(
                self._loss_cls(
                    as_rows(cls_score[level], self.cls_out_channels),
                    labels[level],
                    weights,
                    valid_label_mask[level],
                    avg_factor,
                    is_object,
                    boxes,
                    bbox_targets[level],
                )
            )
            box_loss = run(
                *(self.loss_bbox, boxes, bbox_targets[level]), weight=centred[level], avg_factor=1.0
            )
            losses["loss_bbox"].append(box_loss / box_norm)
            losses["loss_centerness"].append(
                run(
                    *(self.loss_centerness, as_rows(centerness[level], 1).squeeze(-1)),
                    centred[level],
                    weight=is_object.to(centred[level].dtype),
                    avg_factor=avg_factor,
                )
            )
        return losses

    def _loss_cls(
        self,
        scores: Tensor,
        labels: Tensor,
        weights: Tensor,
        valid_label_mask: Tensor,
        avg_factor: float | Tensor,
        is_object: Tensor,
        boxes: Tensor,
        targets: Tensor,
    ) -> Tensor:
        if self.use_qfl:
            with torch.no_grad():
                missed = iou_loss(
                    boxes.detach(), targets, mode="linear", eps=_MIN_QUALITY, keep=boxes.dim() - 1
                )
                quality = torch.where(is_object, 1 - missed, 0)
            return run(
                self.loss_cls, scores, (labels, quality), weight=weights, avg_factor=avg_factor
            )
        kwargs: dict[str, Any] = {"weight": weights, "avg_factor": avg_factor}
        if self.use_sigmoid_cls:
            kwargs["valid_label_mask"] = valid_label_mask
        return run(self.loss_cls, scores, labels, **kwargs)

    def _centerness_targets(
        self, anchors: Sequence[Tensor], targets: Sequence[Tensor], positive: Sequence[Tensor]
    ) -> list[Tensor]:
        """Per level (N, n): the centerness of positives, 0 elsewhere; all levels in one go."""
        sizes = [level.shape[1] for level in anchors]
        with torch.no_grad():
            values = self.centerness_target(
                torch.cat(list(anchors), 1), torch.cat(list(targets), 1)
            )
            values = torch.where(torch.cat(list(positive), 1), values, 0)
        return list(values.split(sizes, 1))

    def centerness_target(self, anchors: Tensor, gts: Tensor) -> Tensor:
        """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of anchor centres in boxes.

        Shapes:
            anchors, gts: (..., 4) xyxy. Returns (...,) in [0, 1]; 0 for a centre outside its box.
        """
        x1, y1, x2, y2 = columns(anchors)
        left, top, right, bottom = columns(gts)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        left, right, top, bottom = x - left, right - x, y - top, bottom - y
        across = torch.minimum(left, right) / torch.maximum(left, right)
        down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        return (across * down).clamp(min=0).sqrt()
