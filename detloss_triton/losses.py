"""The component losses as modules, with OTX's arguments: what the criteria's slots take.

Leading dimensions are free: (N, C) as in OTX, or (batch, anchors, C) views that need no copy.
`forward(..., weight, avg_factor, reduction_override)` is common to them: losses times weight, then
their mean, sum, or with avg_factor their sum / (avg_factor + 2^-23), then times `loss_weight`.
A box whose weight is 0 adds exactly nothing, whatever it holds. As in OTX, further keyword
arguments are ignored. Gradients flow to predictions only: targets, weights and avg_factor that
require one are detached.

Raised before anything is computed: TypeError for what is no tensor; ValueError for an unknown
reduction, shapes or devices that disagree, labels that are not integers, an avg_factor of several
numbers or with "sum".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .boxes import ltrb
from .engine import RowOp
from .ops import classification, distribution, regression
from .ops.selection import first_set
from .precision import arithmetic_dtype, as_indices, at_least_float32
from .reduction import EPS32, check_reduction, reduced
from .settings import described, fused
from .shapes import Dimensions, check_shapes
from .validate import check_count

if TYPE_CHECKING:
    from .vec2box import Vec2Box

_ROWS: Dimensions = (...,)
_ENTRIES: Dimensions = (..., "C")
_BOXES: Dimensions = (..., 4)
_COLUMN: Dimensions = (..., 1)
# Name and constants of an op.
Term = tuple[str, tuple[float, ...]]
_OPTIONAL = ("weight", "valid_label_mask")


class Loss(nn.Module):
    """What the component losses share.

    Args:
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
    """

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.loss_weight = loss_weight

    def term(self) -> Term | None:
        """Its op and constants, as fused ops know them; None where they do not know it."""
        return None

    def extra_repr(self) -> str:
        return described(self)

    def _chosen(self, override: str | None) -> str:
        """The reduction of a call."""
        return self.reduction if override is None else override

    def _reduced(
        self,
        op: RowOp,
        pred: Tensor,
        *constants: Tensor | None,
        override: str | None,
        weight: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return reduced(
            op,
            pred,
            *map(_detached, constants),
            weight=_detached(weight),
            reduction=self._chosen(override),
            scale=self.loss_weight,
            **kwargs,
        )

    def _check(self, **arguments: tuple[Any, Dimensions]) -> None:
        """Raise unless the arguments are tensors that fit each other; None where optional."""
        given = {k: v for k, v in arguments.items() if v[0] is not None or k not in _OPTIONAL}
        check_shapes(type(self).__name__, **given)

    def _labels(self, name: str, labels: Tensor) -> Tensor:
        """Labels as integers wide enough for any number of classes."""
        if (labels.is_floating_point() or labels.is_complex()) and labels.numel() > 0:
            raise ValueError(
                f"{type(self).__name__}: {name} must hold integers, got {labels.dtype}"
            )
        return as_indices(labels)


def _detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


def _has_entries(x: Any, pred: Any) -> bool:
    """Whether x has as many dimensions as the predictions: a value for each entry, not row."""
    return isinstance(x, Tensor) and isinstance(pred, Tensor) and x.dim() == pred.dim()


def _by_entry(x: Tensor, pred: Tensor) -> Tensor:
    """Factors of rows, or of entries, as factors of entries."""
    return (x if _has_entries(x, pred) else x.unsqueeze(-1)).expand(pred.shape)


def _one_hot(labels: Tensor, pred: Tensor) -> Tensor:
    classes = torch.arange(pred.shape[-1], device=pred.device)
    return (labels.unsqueeze(-1) == classes).to(torch.float32)


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy, or with `use_sigmoid` binary cross-entropy of each class.

    Args:
        use_sigmoid: see above.
        use_mask: for mask losses, which this library does not have: must be False.
        class_weight: C factors of a row by its label; with sigmoid, of the positive part.
        avg_non_ignore: without avg_factor, a mean is over what is not ignored.
    """

    _class_weight: Tensor | None

    def __init__(
        self,
        use_sigmoid: bool = False,
        use_mask: bool = False,
        reduction: str = "mean",
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        avg_non_ignore: bool = False,
    ) -> None:
        super().__init__(reduction, loss_weight)
        if use_mask:
            raise NotImplementedError("use_mask: mask losses are not part of a detection library")
        self.use_sigmoid = use_sigmoid
        self.use_mask = use_mask
        self.class_weight = class_weight
        # A buffer, so that it moves with the module; not saved, as OTX's state dict has none.
        weights = None if class_weight is None else torch.as_tensor(class_weight).float()
        self.register_buffer("_class_weight", weights, persistent=False)
        self.avg_non_ignore = avg_non_ignore

    def term(self) -> Term | None:
        known = self.use_sigmoid and self.class_weight is None
        return ("binary_cross_entropy", ()) if known else None

    @fused
    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of scores against labels.

        Shapes:
            cls_score: (..., C) logits.
            label: (...,) class indices, C or beyond for background (sigmoid); or, with
                `use_sigmoid`, (..., C) soft targets in [0, 1]. Negative labels and targets, and
                those equal to `ignore_index`, weigh 0.
            weight: (...,), or with `use_sigmoid` also (..., 1) or the scores' shape.
        """
        dense = self.use_sigmoid and _has_entries(label, cls_score)
        dimensions = _ROWS
        if self.use_sigmoid and weight is not None and _has_entries(weight, cls_score):
            dimensions = _COLUMN if weight.shape[-1] == 1 else _ENTRIES
        labels = (label, _ENTRIES if dense else _ROWS)
        self._check(cls_score=(cls_score, _ENTRIES), label=labels, weight=(weight, dimensions))
        if not dense:
            label = self._labels("label", label)
        kept = label >= 0
        if ignore_index >= 0:
            kept = kept & (label != ignore_index)
        n_losses = cls_score.numel() if self.use_sigmoid else label.numel()
        rest: dict[str, Any] = {"avg_factor": avg_factor, "override": reduction_override}
        if (
            avg_factor is None
            and self.avg_non_ignore
            and self._chosen(reduction_override) == "mean"
        ):
            rest["avg_factor"] = kept.sum() * (n_losses // max(kept.numel(), 1))
        if self.use_sigmoid:
            return self._sigmoid(cls_score, label, kept, weight, **rest)
        if self.class_weight is not None:
            # Whatever class stands in for a label that is none, its row costs 0.
            of_label = self._weights_for(cls_score)[label.clamp(0, cls_score.shape[-1] - 1)]
            weight = of_label if weight is None else weight * of_label
        label = label.masked_fill(~kept, -1)
        return self._reduced(
            distribution.two_bin, cls_score, label, None, None, weight=weight, **rest
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _weights_for(self, scores: Tensor) -> Tensor:
        assert self._class_weight is not None and self.class_weight is not None
        if self._class_weight.shape != scores.shape[-1:]:
            raise ValueError(
                f"{type(self).__name__}: class_weight must hold a factor for each of "
                f"{scores.shape[-1]} scores, got {tuple(self._class_weight.shape)}"
            )
        if scores.dtype == torch.float64:
            return torch.as_tensor(self.class_weight, dtype=torch.float64, device=scores.device)
        return self._class_weight.to(scores.device)

    def _sigmoid(
        self, score: Tensor, label: Tensor, kept: Tensor, weight: Tensor | None, **rest: Any
    ) -> Tensor:
        """Row by row where that says all, else entry by entry."""
        bce, dense = classification.binary_cross_entropy, classification.dense
        by_row = not _has_entries(label, score) and not _has_entries(weight, score)
        if by_row and self.class_weight is None and self._chosen(rest["override"]) != "none":
            weight = kept if weight is None else weight * kept
            return self._reduced(
                bce, score, label, None, None, weight=weight, count=score.numel(), **rest
            )
        target = label if _has_entries(label, score) else _one_hot(label, score)
        kept = _by_entry(kept, score)
        weight = kept if weight is None else _by_entry(weight, score) * kept
        loss = self._reduced(bce, *dense(score, target), weight=weight, **rest)
        if self.class_weight is not None:
            # pos_weight multiplies the positive part t softplus(-x) = t BCE(x, 1) only.
            extra = weight * target * (self._weights_for(score) - 1)
            ones = torch.ones_like(target)
            loss = loss + self._reduced(bce, *dense(score, ones), weight=extra, **rest)
        return loss


class CrossSigmoidFocalLoss(Loss):
    """Focal loss (Lin et al., 2017) against class indices, with a mask of classes to leave out.

    Args:
        use_sigmoid: kept for OTX's sake; must be True.
        gamma: exponent. alpha: weight of positives.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction, loss_weight)
        if not use_sigmoid:
            raise ValueError("use_sigmoid must be True: focal loss is a sigmoid loss")
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha

    def term(self) -> Term | None:
        return "sigmoid_focal", (self.alpha, self.gamma)

    @fused
    def forward(
        self,
        pred: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        reduction_override: str | None = None,
        avg_factor: float | Tensor | None = None,
        valid_label_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of logits against labels. With avg_factor and "mean" it is sum / avg_factor, no eps.

        Shapes:
            pred: (..., C) logits. targets: (...,) in [0, C], C is background. weight: (...,), or
            with "none" (..., C). valid_label_mask: (..., C) or (..., 1), factor of each entry.
            Returns (..., C) for "none".
        """
        reduction = self._chosen(reduction_override)
        check_reduction(reduction)
        by_entry = reduction == "none" and _has_entries(weight, pred)
        one_mask = isinstance(valid_label_mask, Tensor) and valid_label_mask.shape[-1:] == (1,)
        self._check(
            pred=(pred, _ENTRIES),
            targets=(targets, _ROWS),
            weight=(weight, _ENTRIES if by_entry else _ROWS),
            valid_label_mask=(valid_label_mask, _COLUMN if one_mask else _ENTRIES),
        )
        targets = self._labels("targets", targets)
        if valid_label_mask is not None:
            valid_label_mask = valid_label_mask.expand(pred.shape)
        op = classification.sigmoid_focal
        rest: dict[str, Any] = {"override": reduction, "alpha": self.alpha, "gamma": self.gamma}
        if reduction == "none":
            if weight is not None:
                weight = _by_entry(weight, pred)
            if valid_label_mask is not None:
                weight = valid_label_mask if weight is None else weight * valid_label_mask
            entries = classification.dense(pred, _one_hot(targets, pred))
            return self._reduced(op, *entries, weight=weight, **rest)
        if reduction == "mean":
            rest |= {"avg_factor": avg_factor, "avg_eps": 0.0, "count": pred.numel()}
        return self._reduced(op, pred, targets, None, valid_label_mask, weight=weight, **rest)

    if TYPE_CHECKING:
        __call__ = forward


class QualityFocalLoss(Loss):
    """Quality focal loss (Li et al., 2020), one loss per row, summed over its classes.

    Args:
        use_sigmoid: kept for OTX's sake; must be True.
        beta: exponent of the distance between probability and quality.
        activated: predictions are probabilities already.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__(reduction, loss_weight)
        if not use_sigmoid:
            raise ValueError("use_sigmoid must be True: quality focal loss is a sigmoid loss")
        self.use_sigmoid = use_sigmoid
        self.beta = beta
        self.activated = activated

    def term(self) -> Term | None:
        return None if self.activated else ("quality_focal", (self.beta,))

    @fused
    def forward(
        self,
        pred: Tensor,
        target: tuple[Tensor, Tensor] | Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of scores against (label, quality) pairs or dense qualities.

        Shapes:
            pred: (..., C) logits, or probabilities if `activated`.
            target: (label (...,), score (...,)), a label outside [0, C) is background; or (..., C).
            weight: (...,). Returns (...,) for "none".
        """
        op = classification.quality_focal
        rest: dict[str, Any] = {"avg_factor": avg_factor, "override": reduction_override}
        rest["beta"] = self.beta
        checked: dict[str, Any] = {"pred": (pred, _ENTRIES), "weight": (weight, _ROWS)}
        if isinstance(target, (tuple, list)):
            if len(target) != 2:
                raise ValueError(
                    f"QualityFocalLoss: target must be (label, score), got {len(target)} entries"
                )
            label, score = target
            self._check(**checked, label=(label, _ROWS), score=(score, _ROWS))
            label = self._labels("label", label)
            pred = _logit(pred) if self.activated else pred
            return self._reduced(op, pred, label, score, None, weight=weight, **rest)
        self._check(**checked, target=(target, _ENTRIES))
        entries = classification.dense(_logit(pred) if self.activated else pred, target)
        weight = None if weight is None else _by_entry(weight, pred)
        losses = self._reduced(op, *entries, weight=weight, count=pred.shape[:-1].numel(), **rest)
        return losses.sum(-1) if losses.dim() > 0 else losses

    if TYPE_CHECKING:
        __call__ = forward


def _logit(p: Tensor) -> Tensor:
    """Logits of probabilities, finite at 0 and 1 in float32."""
    p = at_least_float32(p)
    return p.clamp(min=torch.finfo(p.dtype).tiny).log() - torch.log1p(-p.clamp(max=1 - EPS32 / 2))


class _BoxLoss(Loss):
    """One loss per pair of boxes, by an op and its constants."""

    _op: RowOp

    def _constants(self) -> dict[str, Any]:
        raise NotImplementedError

    @fused
    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of box pairs.

        Shapes:
            pred, target: (..., 4) xyxy; gradients flow to pred. weight: (...,) or (..., 4), of
            which the mean is taken. Returns (...,) for "none".
        """
        of_sides = _has_entries(weight, pred)
        dimensions = _BOXES if of_sides else _ROWS
        self._check(pred=(pred, _BOXES), target=(target, _BOXES), weight=(weight, dimensions))
        if weight is not None and of_sides:
            weight = at_least_float32(weight).mean(-1)
        return self._reduced(
            self._op,
            pred,
            target,
            weight=weight,
            avg_factor=avg_factor,
            override=reduction_override,
            **self._constants(),
        )

    if TYPE_CHECKING:
        __call__ = forward


class IoULoss(_BoxLoss):
    """-log IoU ("log"), 1 - IoU^2 ("square") or 1 - IoU ("linear"), with the IoU at least eps.

    Args:
        linear: the same as mode="linear".
        eps: floor of the IoU.
    """

    _op = regression.iou_loss

    def __init__(
        self,
        linear: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        mode: str = "log",
    ) -> None:
        super().__init__(reduction, loss_weight)
        regression.check_iou_mode(mode)
        self.linear = linear
        self.mode = "linear" if linear else mode
        self.eps = eps

    def term(self) -> Term | None:
        return f"iou_loss {self.mode}", (self.eps,)

    def _constants(self) -> dict[str, Any]:
        return {"mode": self.mode, "eps": self.eps}


class GIoULoss(_BoxLoss):
    """1 - GIoU (Rezatofighi et al., 2019), union and hull at least eps."""

    _op = regression.giou_loss

    def __init__(
        self, eps: float = regression.GIOU_EPS, reduction: str = "mean", loss_weight: float = 1.0
    ) -> None:
        super().__init__(reduction, loss_weight)
        self.eps = eps

    def term(self) -> Term | None:
        return "giou_loss", (self.eps,)

    def _constants(self) -> dict[str, Any]:
        return {"eps": self.eps}


class L1Loss(Loss):
    """|pred - target|, one loss per coordinate."""

    def term(self) -> Term | None:
        return "l1", ()

    @fused
    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of coordinates.

        Shapes:
            pred, target: any, the same. weight: the same, or without the last dimension.
        """
        self._check(pred=(pred, _ROWS), target=(target, _ROWS))
        if weight is not None:
            rows = pred.shape if _has_entries(weight, pred) else pred.shape[:-1]
            self._check(pred=(pred, _ROWS), weight=(weight, tuple(rows)))
            weight = _by_entry(weight, pred)
        pred, target = pred.unsqueeze(-1), target.unsqueeze(-1)
        rest: dict[str, Any] = {"avg_factor": avg_factor, "override": reduction_override}
        return self._reduced(regression.l1, pred, target, weight=weight, **rest)

    if TYPE_CHECKING:
        __call__ = forward


class BCELoss(nn.Module):
    """YOLOv9's classification loss: the sum of binary cross-entropies over the sum of targets."""

    @fused
    def forward(self, predicts_cls: Tensor, targets_cls: Tensor, cls_norm: Tensor) -> Tensor:
        """Shapes: predicts_cls (B, A, C) logits, targets_cls (B, A, C) in [0, 1], cls_norm ()."""
        check_shapes(
            type(self).__name__,
            predicts_cls=(predicts_cls, _ENTRIES),
            targets_cls=(targets_cls, _ENTRIES),
        )
        entries = classification.dense(predicts_cls, targets_cls.detach())
        return classification.binary_cross_entropy(*entries) / cls_norm

    if TYPE_CHECKING:
        __call__ = forward


def _matched(
    module: nn.Module, valid_masks: Tensor, box_norm: Tensor, **others: tuple[Any, Dimensions]
) -> tuple[Tensor, Tensor]:
    """(indices, weights) of the anchors that are matched, as many as box_norm has rows.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for shapes that disagree, and where a CPU sees that another number is matched.
    """
    check_shapes(
        type(module).__name__,
        **others,
        valid_masks=(valid_masks, ("B", "A")),
        box_norm=(box_norm, ("P",)),
    )
    mask = valid_masks.flatten()
    check_count(type(module).__name__, "valid_masks", mask, "box_norm", len(box_norm))
    index = first_set(mask, n=len(box_norm))
    missing = index >= len(mask)
    return index.masked_fill(missing, 0), box_norm.detach().masked_fill(missing, 0)


class BoxLoss(nn.Module):
    """YOLOv9's box loss: 1 - CIoU of the matched anchors, weighted by their score.

    Args:
        rules: "otx", or "yolo", by which the CIoU's denominators have 1e-7 added, not 1e-9, and its
            alpha is a constant.
    """

    def __init__(self, rules: regression.Rules = "otx") -> None:
        super().__init__()
        regression.check_rules(type(self).__name__, rules)
        self.rules = rules

    def extra_repr(self) -> str:
        return described(self)

    @fused
    def forward(
        self,
        predicts_bbox: Tensor,
        targets_bbox: Tensor,
        valid_masks: Tensor,
        box_norm: Tensor,
        cls_norm: Tensor,
    ) -> Tensor:
        """Weighted sum over the P matched anchors, over cls_norm.

        Shapes:
            predicts_bbox, targets_bbox (B, A, 4) xyxy; valid_masks (B, A) with P entries set;
            box_norm (P,) scores of these, in order; cls_norm ().
        """
        index, weight = _matched(
            self,
            valid_masks,
            box_norm,
            predicts_bbox=(predicts_bbox, ("B", "A", 4)),
            targets_bbox=(targets_bbox, ("B", "A", 4)),
        )
        losses = regression.ciou_loss(
            predicts_bbox.reshape(-1, 4).index_select(0, index),
            targets_bbox.detach().reshape(-1, 4).index_select(0, index),
            weight=weight,
            eps=regression.YOLOV9_EPS[self.rules],
            alpha_grad=self.rules == "otx",
        )
        return losses / cls_norm

    if TYPE_CHECKING:
        __call__ = forward


class DFLoss(nn.Module):
    """YOLOv9's distribution focal loss (Li et al., 2020) of the matched anchors' four sides.

    Args:
        vec2box: the anchors.
        reg_max: number of bins.
    """

    def __init__(self, vec2box: Vec2Box, reg_max: int = 16) -> None:
        super().__init__()
        self.vec2box = vec2box
        self.reg_max = reg_max

    @fused
    def forward(
        self,
        predicts_anc: Tensor,
        targets_bbox: Tensor,
        valid_masks: Tensor,
        box_norm: Tensor,
        cls_norm: Tensor,
    ) -> Tensor:
        """Mean over sides, weighted sum over the P matched anchors, over cls_norm.

        Shapes:
            predicts_anc (B, A, 4, bins) logits; targets_bbox (B, A, 4) xyxy in strides;
            valid_masks (B, A) with P entries set; box_norm (P,); cls_norm ().
        """
        anchor_grid = self.vec2box.anchor_grid
        index, weight = _matched(
            self,
            valid_masks,
            box_norm,
            **{"vec2box.anchor_grid": (anchor_grid, ("A", 2))},
            targets_bbox=(targets_bbox, ("B", "A", 4)),
            predicts_anc=(predicts_anc, ("B", "A", 4, "bins")),
        )
        centre = anchor_grid.to(arithmetic_dtype(targets_bbox)) / self.vec2box.scaler.unsqueeze(-1)
        distances = ltrb(centre.expand(len(targets_bbox), -1, -1), targets_bbox.detach())
        left, right_weight = distribution.two_bins(
            distances.reshape(-1, 4).index_select(0, index), self.reg_max
        )
        losses = distribution.two_bin(
            predicts_anc.reshape(-1, *predicts_anc.shape[2:]).index_select(0, index),
            left,
            1 - right_weight,
            right_weight,
            weight=(weight / 4).unsqueeze(-1).expand(left.shape),
        )
        return losses / cls_norm

    if TYPE_CHECKING:
        __call__ = forward
