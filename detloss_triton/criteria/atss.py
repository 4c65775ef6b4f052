"""ATSS: classification, box regression and centerness on feature levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detloss_triton.boxes import centerness
from detloss_triton.losses import CrossEntropyLoss, CrossSigmoidFocalLoss, QualityFocalLoss
from detloss_triton.once import once
from detloss_triton.ops.dense import MIN_QUALITY, dense, is_object
from detloss_triton.ops.regression import iou_loss
from detloss_triton.precision import as_indices, at_least_float32
from detloss_triton.reduction import EPS32, as_divisor, rank_means
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
    BOX_TERMS,
    ONE,
    as_given,
    as_rows,
    at_positives,
    check_labels,
    check_levels,
    check_maps,
    class_loss,
    divisor_of,
    ignores_labels,
    is_our_coder,
    is_ours,
    of_positives,
    refuse_overrides,
    takes,
    term_of,
)

_SLOTS = ("loss_cls", "loss_bbox", "loss_centerness")

# What OTX's forward calls level by level.
_NOT_CALLED = (
    "_forward",
    "_get_pos_inds",
    "_get_loss_cls",
    "_get_loss_bbox",
    "_get_loss_centerness",
)

# What `forward` takes of each level.
_LEVELS = (
    "anchors",
    "cls_score",
    "bbox_pred",
    "centerness",
    "labels",
    "label_weights",
    "bbox_targets",
    "valid_label_mask",
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

    Examples:
        One level of 3 x 4 positions with an anchor each; label 5 is background.

        >>> import torch
        >>> from detloss_triton import ATSSCriterion, CrossSigmoidFocalLoss
        >>> from detloss_triton import DeltaXYWHBBoxCoder, GIoULoss
        >>> criterion = ATSSCriterion(5, DeltaXYWHBBoxCoder(), CrossSigmoidFocalLoss(), GIoULoss())
        >>> scores, deltas, centerness = (torch.zeros(2, n, 3, 4) for n in (5, 4, 1))
        >>> anchors = torch.tensor([[0.0, 0.0, 64.0, 64.0]]).expand(2, 12, 4)
        >>> labels = torch.full((2, 12), 5).index_fill(1, torch.tensor([7]), 3)
        >>> weights, valid = torch.ones(2, 12), torch.ones(2, 12, 1)
        >>> levels = [anchors], [scores], [deltas], [centerness], [labels], [weights]
        >>> losses = criterion(*levels, [anchors], [valid], avg_factor=2)
        >>> losses["loss_cls"], losses["loss_centerness"]
        ([tensor(7.7113)], [tensor(0.6931)])
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
        self._check(
            anchors,
            cls_score,
            bbox_pred,
            centerness,
            labels,
            label_weights,
            bbox_targets,
            valid_label_mask,
        )
        place = f"{type(self).__name__}: avg_factor"
        avg_factor = as_divisor(place, avg_factor, dtype, labels[0].device)
        if enabled():
            self._check_values(
                anchors=anchors,
                cls_score=cls_score,
                bbox_pred=bbox_pred,
                centerness=centerness,
                labels=labels,
                label_weights=label_weights,
                bbox_targets=bbox_targets,
                valid_label_mask=valid_label_mask,
                avg_factor=avg_factor,
            )
        terms = self._terms()
        if terms is None:
            scores = [as_rows(level, self.cls_out_channels) for level in cls_score]
            codes = [as_rows(level, 4) for level in bbox_pred]
            logits = [as_rows(level, 1).squeeze(-1) for level in centerness]
            levels = [
                (*level, dtype)
                for level in zip(
                    anchors,
                    scores,
                    codes,
                    logits,
                    labels,
                    label_weights,
                    bbox_targets,
                    valid_label_mask,
                    strict=True,
                )
            ]
            return self._by_module([_Level(*level) for level in levels], avg_factor)
        masks: tuple[Tensor, ...] = ()
        if self._masks():
            width = self.cls_out_channels
            masks = tuple(
                x if x.shape[-1] == width else x.expand(-1, -1, width) for x in valid_label_mask
            )
        divisor, number = divisor_of(avg_factor, labels[0].device)
        losses = dense.unbound(
            as_given(cls_score, self.cls_out_channels),
            tuple(map(as_indices, labels)),
            (),
            tuple(label_weights),
            masks,
            as_given(bbox_pred, 4),
            tuple(anchors),
            tuple(bbox_targets),
            tuple([x.squeeze(-1) if x.dim() == 3 else x for x in as_given(centerness, 1)]),
            divisor,
            number=number,
            by_iou=self.use_qfl,
            background=float(self.bg_loss_weight),
            **terms,
        )
        n = len(labels)
        return {
            "loss_cls": losses[:n],
            "loss_bbox": losses[n : 2 * n],
            "loss_centerness": losses[2 * n :],
        }

    if TYPE_CHECKING:
        __call__ = forward

    def _terms(self) -> dict[str, Any] | None:
        """What `dense` computes if it knows the modules and the coder."""
        by_label = ("sigmoid_focal", "binary_cross_entropy")
        classes = term_of(self.loss_cls, *(("quality_focal",) if self.use_qfl else by_label))
        boxes = term_of(self.loss_bbox, *BOX_TERMS)
        logits = term_of(self.loss_centerness, "binary_cross_entropy")
        decode: tuple[str, tuple[float, ...]] | None = ("", ())
        if self.reg_decoded_bbox:
            decode = self.bbox_coder.term() if is_our_coder(self.bbox_coder) else None
        if classes is None or boxes is None or logits is None or decode is None:
            return None
        if self._has_own_centerness():
            return None
        return {
            "classes": classes[0],
            "class_constants": classes[1],
            "boxes": boxes[0],
            "box_constants": boxes[1],
            "decode": decode[0],
            "decode_constants": decode[1],
            "factors": (classes[2], boxes[2] / ONE, logits[2]),
            # The focal loss alone divides by the bare factor.
            "added": (0.0 if classes[0] == "sigmoid_focal" else EPS32, 0.0, EPS32),
        }

    def _has_own_centerness(self) -> bool:
        method = type(self).centerness_target
        is_ours = method is ATSSCriterion.centerness_target
        return not is_ours or "centerness_target" in self.__dict__

    def _by_module(
        self, levels: Sequence[_Level], avg_factor: float | Tensor
    ) -> dict[str, list[Tensor]]:
        """All levels by the modules, which are called with OTX's arguments."""
        positive = [is_object(level.labels, self.num_classes) for level in levels]
        with torch.no_grad():
            centred = [self._centred(*pair) for pair in zip(levels, positive, strict=True)]
        (box_norm,) = rank_means(torch.cat(centred, 1).sum())
        boxes = [self._boxes(*pair) for pair in zip(levels, positive, strict=True)]
        rows = list(zip(levels, positive, centred, boxes, strict=True))
        return {
            "loss_cls": [
                self._loss_cls(level, avg_factor, here, box) for level, here, _, box in rows
            ],
            "loss_bbox": [
                of_positives(self.loss_bbox, box, level.targets, here, weight, avg_factor=1.0)
                / box_norm.clamp(min=1)
                for level, here, weight, box in rows
            ],
            "loss_centerness": [
                of_positives(
                    self.loss_centerness, level.logits, weight, here, avg_factor=avg_factor
                )
                for level, here, weight, _ in rows
            ],
        }

    def _check_values(self, **arguments: Any) -> None:
        """Raise ValueError for values that no assigner makes."""
        labels, targets = arguments["labels"], arguments["bbox_targets"]
        anchors, weights = arguments["anchors"], arguments["label_weights"]
        positive = [is_object(level, self.num_classes) for level in labels]
        check(
            self,
            anchors=XYXY(anchors),
            cls_score=FINITE(arguments["cls_score"]),
            bbox_pred=FINITE(arguments["bbox_pred"]),
            centerness=FINITE(arguments["centerness"]),
            labels=a_class_or_background(self.num_classes, ignores_labels(self.loss_cls))(
                labels, weights
            ),
            label_weights=NOT_NEGATIVE(weights),
            bbox_targets=(XYXY if self.reg_decoded_bbox else FINITE)(targets, positive),
            valid_label_mask=NOT_NEGATIVE(arguments["valid_label_mask"]),
            avg_factor=POSITIVE(arguments["avg_factor"]),
        )
        if self.reg_decoded_bbox:
            both = [torch.cat(pair, -1) for pair in zip(targets, anchors, strict=True)]
            check(self, bbox_targets=MEETS_ANCHOR(both, positive))

    def extra_repr(self) -> str:
        slots = {slot: is_ours(getattr(self, slot)) for slot in _SLOTS}
        return described(self, **slots, bbox_coder=is_our_coder(self.bbox_coder))

    @once("cls_out_channels", "num_classes")
    def _check(self, *levels: Any) -> None:
        """Raise unless these arguments fit each other."""
        check_levels(self, **dict(zip(_LEVELS, levels, strict=True)))
        n_images, places = check_labels(self, levels[4])
        for place, level in zip(places, zip(*levels, strict=True), strict=True):
            anchors, scores, boxes, centres, labels, weights, targets, mask = level
            self._check_rows(place, n_images, labels, weights, anchors, targets, mask)
            check_maps(
                place,
                labels,
                cls_score=(scores, self.cls_out_channels),
                bbox_pred=(boxes, 4),
                centerness=(centres, 1),
            )

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

    def _centred(self, level: _Level, positive: Tensor) -> Tensor:
        """(B, n) centerness of the positives, 0 elsewhere; a user's function is called for them."""
        if not self._has_own_centerness():
            target = self.centerness_target(level.anchors, level.targets)
            return target.masked_fill(~positive, 0)
        blank = torch.zeros_like(level.anchors[..., 0])
        return at_positives(self.centerness_target, blank, positive, level.anchors, level.targets)

    def _boxes(self, level: _Level, positive: Tensor) -> Tensor:
        """(B, n, 4) boxes as `loss_bbox` compares them. What background predicts is not looked at,
        so that whatever it is, its gradient is 0."""
        if self.reg_decoded_bbox and is_our_coder(self.bbox_coder):
            weight = positive.to(level.anchors.dtype)
            return self.bbox_coder.decode(level.anchors, level.codes, weight=weight)
        blank = level.codes.masked_fill(~positive.unsqueeze(-1), 0)
        if not self.reg_decoded_bbox:
            return blank
        decode, blank = self.bbox_coder.decode, at_least_float32(blank)
        return at_positives(decode, blank, positive, level.anchors, level.codes)

    def _loss_cls(
        self, level: _Level, avg_factor: float | Tensor, positive: Tensor, boxes: Tensor
    ) -> Tensor:
        weights = level.weights
        if self.bg_loss_weight >= 0:
            is_background = level.labels == self.num_classes
            weights = at_least_float32(weights).masked_fill(is_background, self.bg_loss_weight)
        target: Tensor | tuple[Tensor, Tensor] = level.labels
        if self.use_qfl:
            with torch.no_grad():
                pairs = boxes.detach(), level.targets
                missed = iou_loss(*pairs, mode="linear", eps=MIN_QUALITY, keep=2)
                target = level.labels, (1 - missed).masked_fill(~positive, 0)
        kwargs: dict[str, Any] = {"avg_factor": avg_factor}
        if self._masks():
            kwargs["valid_label_mask"] = level.mask
        return class_loss(self.loss_cls, level.scores, target, weights, **kwargs)

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
        return centerness(anchors, gts)


class _Level:
    """One level's tensors, (B, n, ...), boxes in the precision of the arithmetic."""

    def __init__(
        self,
        anchors: Tensor,
        scores: Tensor,
        codes: Tensor,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        targets: Tensor,
        mask: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.anchors, self.targets = anchors.to(dtype), targets.to(dtype)
        self.scores, self.codes, self.logits = scores, codes, logits
        self.labels, self.weights, self.mask = labels, weights, mask
