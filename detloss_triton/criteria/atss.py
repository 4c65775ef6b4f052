"""ATSS: classification, box regression and centerness on feature levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.boxes import columns
from detloss_triton.losses import CrossEntropyLoss, CrossSigmoidFocalLoss, QualityFocalLoss
from detloss_triton.ops.regression import iou_loss
from detloss_triton.precision import at_least_float32
from detloss_triton.reduction import as_divisor, rank_means
from detloss_triton.settings import described
from detloss_triton.shapes import check_shapes
from detloss_triton.validate import (
    FINITE,
    MEETS_ANCHOR,
    NOT_NEGATIVE,
    POSITIVE,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .arguments import constants, precision_of
from .levels import (
    all_levels,
    as_rows,
    at_positives,
    boxes_by_level,
    check_labels,
    check_levels,
    check_maps,
    class_loss,
    ignores_labels,
    is_our_coder,
    is_ours,
    is_positive,
    of_positives,
    ours_by_level,
    refuse_overrides,
    takes,
)

# The quality of a positive whose box misses its target altogether.
_MIN_QUALITY = 1e-6

_SLOTS = ("loss_cls", "loss_bbox", "loss_centerness")

# What OTX's forward calls level by level.
_NOT_CALLED = (
    "_forward",
    "_get_pos_inds",
    "_get_loss_cls",
    "_get_loss_bbox",
    "_get_loss_centerness",
)


class ATSSCriterion(nn.Module):
    """Losses of ATSS (Zhang et al., 2020, https://arxiv.org/abs/1912.02424).

    Coders and modules that are not this library's, and an overridden `centerness_target`, are
    called as OTX calls them: level by level, for the positives, whose number the host reads.

    Args:
        num_classes: number of object classes C; label C is background.
        bbox_coder: decodes boxes, e.g. `DeltaXYWHBBoxCoder`.
        loss_cls, loss_bbox, loss_centerness: modules; centerness defaults to binary cross-entropy.
            `loss_cls` is handed `valid_label_mask` if its forward names it.
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
            if qfl_cfg is None or isinstance(qfl_cfg, Mapping):
                loss_cls = QualityFocalLoss(**(qfl_cfg or {}))
            else:
                loss_cls = qfl_cfg
        self.num_classes = num_classes
        self.bbox_coder = bbox_coder
        self.use_qfl = use_qfl
        self.reg_decoded_bbox = reg_decoded_bbox
        self.bg_loss_weight = bg_loss_weight
        self.loss_bbox = loss_bbox
        if loss_centerness is None:
            loss_centerness = CrossEntropyLoss(use_sigmoid=True)
        self.loss_centerness = loss_centerness
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
            centerness (N, k, H, W) logits; labels (N, n) in [0, C], anything where their weight is
            0; label_weights (N, n);
            bbox_targets (N, n, 4) xyxy; valid_label_mask (N, n, C) or (N, n, 1).

        Returns:
            {"loss_cls": [...], "loss_bbox": [...], "loss_centerness": [...]}, 0-dim per level.

        Raises:
            TypeError, ValueError: for an argument that does not fit its level's labels; for an
                `avg_factor` that is no number.
            TypeError: for a subclass that overrides a method of OTX's which is not called.
        """
        refuse_overrides(self, *_NOT_CALLED)
        dtype = precision_of(self, cls_score=cls_score, bbox_pred=bbox_pred, centerness=centerness)
        anchors, labels, label_weights, bbox_targets, valid_label_mask = constants(
            (anchors, labels, label_weights, bbox_targets, valid_label_mask), dtype
        )
        check_levels(
            self,
            anchors=anchors,
            cls_score=cls_score,
            bbox_pred=bbox_pred,
            centerness=centerness,
            labels=labels,
            label_weights=label_weights,
            bbox_targets=bbox_targets,
            valid_label_mask=valid_label_mask,
        )
        n_images, places = check_labels(self, labels)
        for level, rows in enumerate(
            zip(labels, label_weights, anchors, bbox_targets, valid_label_mask, strict=True)
        ):
            self._check_rows(places[level], n_images, *rows)
            check_maps(
                places[level],
                labels[level],
                cls_score=(cls_score[level], self.cls_out_channels),
                bbox_pred=(bbox_pred[level], 4),
                centerness=(centerness[level], 1),
            )
        place = f"{type(self).__name__}: avg_factor"
        avg_factor = as_divisor(place, avg_factor, dtype, labels[0].device)
        sizes = [level.shape[1] for level in labels]
        # What is small is joined: an operation on all levels costs what one on a level does.
        is_object = is_positive(torch.cat(list(labels), 1), self.num_classes)
        positive = is_object.split(sizes, 1)
        if enabled():
            check(
                self,
                anchors=XYXY(anchors),
                cls_score=FINITE(cls_score),
                bbox_pred=FINITE(bbox_pred),
                centerness=FINITE(centerness),
                labels=a_class_or_background(self.num_classes, ignores_labels(self.loss_cls))(
                    labels, label_weights
                ),
                label_weights=NOT_NEGATIVE(label_weights),
                bbox_targets=(XYXY if self.reg_decoded_bbox else FINITE)(bbox_targets, positive),
                valid_label_mask=NOT_NEGATIVE(valid_label_mask),
                avg_factor=POSITIVE(avg_factor),
            )
            if self.reg_decoded_bbox:
                pairs = zip(bbox_targets, anchors, strict=True)
                both = [torch.cat(pair, -1) for pair in pairs]
                check(self, bbox_targets=MEETS_ANCHOR(both, positive))
        grid, targets = all_levels(anchors, dtype), all_levels(bbox_targets, dtype)
        with torch.no_grad():
            centred = self._centerness(grid, targets, is_object, sizes)
        (box_norm,) = rank_means(centred.sum())
        codes = torch.cat([as_rows(level, 4) for level in bbox_pred], 1)
        boxes = self._boxes(grid, codes, is_object, sizes)
        return {
            "loss_cls": [
                self._loss_cls(
                    as_rows(cls_score[level], self.cls_out_channels),
                    labels[level],
                    label_weights[level],
                    valid_label_mask[level],
                    avg_factor,
                    positive[level],
                    boxes_here,
                    bbox_targets[level],
                )
                for level, boxes_here in enumerate(boxes.split(sizes, 1))
            ],
            "loss_bbox": boxes_by_level(
                self.loss_bbox,
                boxes,
                targets,
                sizes,
                positive=is_object,
                weight=centred,
                norm=box_norm.clamp(min=1),
            ),
            "loss_centerness": self._loss_centerness(
                torch.cat([as_rows(level, 1).squeeze(-1) for level in centerness], 1),
                centred,
                is_object,
                sizes,
                avg_factor,
            ),
        }

    def extra_repr(self) -> str:
        slots = {slot: is_ours(getattr(self, slot)) for slot in _SLOTS}
        return described(self, **slots, bbox_coder=is_our_coder(self.bbox_coder))

    def _check_rows(
        self,
        place: str,
        n_images: int,
        labels: Any,
        label_weights: Any,
        anchors: Any,
        bbox_targets: Any,
        valid_label_mask: Any,
    ) -> None:
        """Raise unless a level's arguments other than predictions fit its labels (N, n)."""
        width = valid_label_mask.shape[-1] if isinstance(valid_label_mask, Tensor) else 0
        # Softmax scores have one class more, and read no mask: OTX wants one of their width.
        if width not in (1, self.cls_out_channels):
            width = self.num_classes
        check_shapes(
            place,
            labels=(labels, (n_images, "n")),
            label_weights=(label_weights, (n_images, "n")),
            anchors=(anchors, (n_images, "n", 4)),
            bbox_targets=(bbox_targets, (n_images, "n", 4)),
            valid_label_mask=(valid_label_mask, (n_images, "n", width)),
        )

    def _centerness(
        self, anchors: Tensor, targets: Tensor, is_object: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """(B, n) centerness of the positives, 0 elsewhere; a user's function is called for them."""
        method = type(self).centerness_target
        if method is ATSSCriterion.centerness_target and "centerness_target" not in self.__dict__:
            return self.centerness_target(anchors, targets).masked_fill(~is_object, 0)
        blank = torch.zeros_like(anchors[..., 0])
        return at_positives(self.centerness_target, blank, is_object, sizes, anchors, targets)

    def _boxes(
        self, anchors: Tensor, codes: Tensor, is_object: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """(B, n, 4) boxes as `loss_bbox` compares them. What background predicts is not looked at,
        so that whatever it is, its gradient is 0."""
        if self.reg_decoded_bbox and is_our_coder(self.bbox_coder):
            return self.bbox_coder.decode(anchors, codes, weight=is_object.to(anchors.dtype))
        blank = codes.masked_fill(~is_object.unsqueeze(-1), 0)
        if not self.reg_decoded_bbox:
            return blank
        decode = self.bbox_coder.decode
        return at_positives(decode, at_least_float32(blank), is_object, sizes, anchors, codes)

    def _loss_centerness(
        self,
        logits: Tensor,
        target: Tensor,
        is_object: Tensor,
        sizes: Sequence[int],
        avg_factor: float | Tensor,
    ) -> list[Tensor]:
        if is_ours(self.loss_centerness):
            logits = logits.masked_fill(~is_object, 0)
            return ours_by_level(
                self.loss_centerness,
                logits,
                target,
                sizes,
                weight=is_object.to(target.dtype),
                avg_factor=avg_factor,
            )
        levels = zip(*(x.split(sizes, 1) for x in (logits, target, is_object)), strict=True)
        return [
            of_positives(self.loss_centerness, *level, avg_factor=avg_factor) for level in levels
        ]

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
        if self.bg_loss_weight >= 0:
            is_background = labels == self.num_classes
            weights = at_least_float32(weights).masked_fill(is_background, self.bg_loss_weight)
        if self.use_qfl:
            with torch.no_grad():
                missed = iou_loss(
                    boxes.detach(), targets, mode="linear", eps=_MIN_QUALITY, keep=boxes.dim() - 1
                )
                quality = (1 - missed).masked_fill(~is_object, 0)
            target: Tensor | tuple[Tensor, Tensor] = (labels, quality)
        else:
            target = labels
        kwargs: dict[str, Any] = {"avg_factor": avg_factor}
        if self._masks():
            kwargs["valid_label_mask"] = valid_label_mask
        return class_loss(self.loss_cls, scores, target, weights, **kwargs)

    def _masks(self) -> bool:
        """Whether `loss_cls` leaves out classes by a mask: focal losses do, ours and OTX's."""
        if is_ours(self.loss_cls):
            return isinstance(self.loss_cls, CrossSigmoidFocalLoss)
        return takes(self.loss_cls, "valid_label_mask")

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
