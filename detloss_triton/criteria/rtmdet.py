"""RTMDet: classification by quality, box regression on feature levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from detloss_triton.once import once
from detloss_triton.ops.dense import dense, is_object, joined
from detloss_triton.precision import as_indices, at_least_float32
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
    BOX_TERMS,
    ONE,
    as_given,
    as_rows,
    check_labels,
    check_levels,
    check_maps,
    class_loss,
    ignores_labels,
    is_ours,
    of_positives,
    refuse_overrides,
    term_of,
)

# What `forward` takes of each level.
_LEVELS = (
    "cls_score",
    "bbox_pred",
    "labels",
    "label_weights",
    "bbox_targets",
    "assign_metrics",
    "stride",
)


class RTMDetCriterion(nn.Module):
    """Losses of RTMDet (Lyu et al., 2022, https://arxiv.org/abs/2212.07784).

    Args:
        num_classes: number of object classes C; label C is background.
        loss_cls: module taking (scores, (labels, qualities)), e.g. `QualityFocalLoss`.
        loss_bbox: module comparing boxes xyxy, e.g. `GIoULoss`.

    Examples:
        One level of 3 x 4 points, whose boxes are decoded; label 5 is background.

        >>> import torch
        >>> from detloss_triton import GIoULoss, QualityFocalLoss, RTMDetCriterion
        >>> criterion = RTMDetCriterion(5, QualityFocalLoss(), GIoULoss(loss_weight=2.0))
        >>> scores, boxes = torch.zeros(2, 5, 3, 4), torch.tensor([0.0, 0.0, 8.0, 8.0])
        >>> labels = torch.full((2, 12), 5).index_fill(1, torch.tensor([7]), 3)
        >>> weights, quality = torch.ones(2, 12), torch.full((2, 12), 0.5)
        >>> boxes, targets = boxes.expand(2, 12, 4), 2 * boxes.expand(2, 12, 4)
        >>> criterion([scores], [boxes], [labels], [weights], [targets], [quality], [(8, 8)])
        {'loss_cls': [tensor(1.7040)], 'loss_bbox': [tensor(1.5000)]}
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
        self._check(
            cls_score, bbox_pred, labels, label_weights, bbox_targets, assign_metrics, stride
        )
        self._check_strides(stride)
        if enabled():
            self._check_values(
                cls_score, bbox_pred, labels, label_weights, bbox_targets, assign_metrics
            )
        terms = self._terms()
        if terms is None:
            scores = tuple(as_rows(level, self.cls_out_channels) for level in cls_score)
            boxes = tuple(as_rows(level, 4) for level in bbox_pred)
            return self._by_module(
                scores, boxes, labels, assign_metrics, label_weights, bbox_targets, dtype
            )
        losses = dense.unbound(
            as_given(cls_score, self.cls_out_channels),
            tuple(map(as_indices, labels)),
            tuple(assign_metrics),
            tuple(label_weights),
            (),
            as_given(bbox_pred, 4),
            (),
            tuple(bbox_targets),
            (),
            (),
            number=1.0,
            decode="",
            decode_constants=(),
            by_iou=False,
            background=-1.0,
            added=(0.0, 0.0),
            **terms,
        )
        n = len(labels)
        return {"loss_cls": losses[:n], "loss_bbox": losses[n:]}

    if TYPE_CHECKING:
        __call__ = forward

    def _terms(self) -> dict[str, Any] | None:
        """What `dense` computes if it knows the modules."""
        classes = term_of(self.loss_cls, "quality_focal")
        boxes = term_of(self.loss_bbox, *BOX_TERMS)
        if classes is None or boxes is None:
            return None
        return {
            "classes": classes[0],
            "class_constants": classes[1],
            "boxes": boxes[0],
            "box_constants": boxes[1],
            "factors": (classes[2] / ONE, boxes[2] / ONE),
        }

    def _by_module(
        self,
        scores: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        metrics: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> dict[str, list[Tensor]]:
        """All levels by the modules, which are called with OTX's arguments."""
        positive = [is_object(level, self.num_classes) for level in labels]
        of_boxes = [m.to(dtype).masked_fill(~p, 0) for m, p in zip(metrics, positive, strict=True)]
        cls_norm, box_norm = rank_means(joined(metrics, dtype).sum(), joined(of_boxes, dtype).sum())
        targets_of_classes = [
            (x, at_least_float32(y)) for x, y in zip(labels, metrics, strict=True)
        ]
        classes = [
            class_loss(self.loss_cls, *level, avg_factor=1.0)
            for level in zip(scores, targets_of_classes, weights, strict=True)
        ]
        return {
            "loss_cls": [loss / cls_norm.clamp(min=1) for loss in classes],
            "loss_bbox": [
                of_positives(self.loss_bbox, *level, avg_factor=1.0) / box_norm.clamp(min=1)
                for level in zip(boxes, targets, positive, of_boxes, strict=True)
            ],
        }

    def _check_values(
        self,
        cls_score: Any,
        bbox_pred: Any,
        labels: Sequence[Tensor],
        label_weights: Any,
        bbox_targets: Any,
        assign_metrics: Sequence[Tensor],
    ) -> None:
        """Raise ValueError for values that no assigner makes."""
        positive = [is_object(level, self.num_classes) for level in labels]
        weights = [m * p for m, p in zip(assign_metrics, positive, strict=True)]
        check(
            self,
            cls_score=FINITE(cls_score),
            bbox_pred=FINITE(bbox_pred),
            labels=a_class_or_background(self.num_classes, ignores_labels(self.loss_cls))(
                labels, label_weights
            ),
            label_weights=NOT_NEGATIVE(label_weights),
            assign_metrics=FRACTION(assign_metrics),
            bbox_targets=XYXY(bbox_targets, weights),
        )
        check(self, assign_metrics=NOTHING(assign_metrics, [~p for p in positive]))

    def extra_repr(self) -> str:
        return described(self, loss_cls=is_ours(self.loss_cls), loss_bbox=is_ours(self.loss_bbox))

    @once("cls_out_channels")
    def _check(self, *levels: Any) -> None:
        """Raise unless these arguments fit each other."""
        check_levels(self, **dict(zip(_LEVELS, levels, strict=True)))
        n_images, places = check_labels(self, levels[2])
        for place, (scores, boxes, *rows, _) in zip(places, zip(*levels, strict=True), strict=True):
            self._check_rows(place, n_images, *rows)
            maps = {"cls_score": (scores, self.cls_out_channels), "bbox_pred": (boxes, 4)}
            check_maps(place, rows[0], **maps)

    def _check_rows(
        self,
        place: str,
        n_images: int,
        labels: Any,
        label_weights: Any,
        bbox_targets: Any,
        assign_metrics: Any,
    ) -> None:
        """Raise unless a level's arguments other than predictions fit its labels (N, n)."""
        check_shapes(
            place,
            labels=(labels, (n_images, "n")),
            label_weights=(label_weights, (n_images, "n")),
            bbox_targets=(bbox_targets, (n_images, "n", 4)),
            assign_metrics=(assign_metrics, (n_images, "n")),
        )

    def _check_strides(self, strides: Sequence[Any]) -> None:
        """Raise ValueError unless each level's is a pair of the same number."""
        for level, stride in enumerate(strides):
            place = f"{type(self).__name__}, level {level}"
            if not isinstance(stride, (Sequence, np.ndarray)) or len(stride) != 2:
                raise ValueError(f"{place}: stride must be a pair (x, y), got {stride!r}")
            if stride[0] != stride[1]:
                raise ValueError(
                    f"{place}: stride must be the same in x and y, got {tuple(stride)}"
                )
