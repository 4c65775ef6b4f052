"""The component losses as modules, with OTX's arguments: what the criteria's slots take.

Leading dimensions are free: (N, C) as in OTX, or (batch, anchors, C) views that need no copy.
`forward(..., weight, avg_factor, reduction_override)` is common to them: losses times weight, then
their mean, sum, or with avg_factor their sum / (avg_factor + 2^-23), then times `loss_weight`.
A box whose weight is 0 adds exactly nothing, whatever it holds. As in OTX, further keyword
arguments are ignored. Gradients flow to predictions only: targets, weights and avg_factor that
require one are detached.

Raised before anything is computed: TypeError for what is no tensor, ValueError for an unknown
reduction, shapes or devices that disagree, labels that are not integers, an avg_factor of several
numbers or with "sum".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .boxes import ltrb
from .ops import classification, distribution, regression
from .ops.selection import first_set
from .precision import arithmetic_dtype, as_indices, at_least_float32
from .reduction import EPS32, check_reduction, reduced
from .settings import described
from .shapes import check_count, check_shapes

if TYPE_CHECKING:
    from .vec2box import Vec2Box


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

    def extra_repr(self) -> str:
        return described(self)

    def _reduced(
        self,
        op: Any,
        pred: Tensor,
        *constants: Tensor | None,
        override: str | None,
        weight: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        reduction = self.reduction if override is None else override
        return reduced(
            op,
            pred,
            *map(_detached, constants),
            weight=_detached(weight),
            reduction=reduction,
            scale=self.loss_weight,
            **kwargs,
        )

    def _check(self, pred: Any, rows: Sequence[int] | None = None, **others: Any) -> None:
        """Raise unless the others are tensors on pred's device, with its rows if they are given."""
        place = type(self).__name__
        for name, x in others.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{place}: {name} must be a tensor, got {type(x).__name__}")
            if rows is not None and x.shape != tuple(rows):
                raise ValueError(
                    f"{place}: {name} must have shape {tuple(rows)}, got {tuple(x.shape)}"
                )
            if x.device != pred.device and x.numel() > 0:
                raise ValueError(
                    f"{place}: {name} must be on {pred.device} as the predictions are, "
                    f"got {x.device}"
                )

    def _labels(self, name: str, labels: Tensor) -> Tensor:
        """Labels as integers wide enough for any number of classes."""
        if (labels.is_floating_point() or labels.is_complex()) and labels.numel() > 0:
            raise ValueError(
                f"{type(self).__name__}: {name} must hold integers, got {labels.dtype}"
            )
        return as_indices(labels)


def _detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


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
        # Moves with the module, so that no step copies it to the device; not in the state dict.
        weights = None if class_weight is None else torch.as_tensor(class_weight).float()
        self.register_buffer("_class_weight", weights, persistent=False)
        self.avg_non_ignore = avg_non_ignore

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
        rows, entries = cls_score.shape[:-1], cls_score.shape
        dense = self.use_sigmoid and isinstance(label, Tensor) and label.dim() == len(entries)
        self._check(cls_score, entries if dense else rows, label=label)
        if not dense:
            label = self._labels("label", label)
        if weight is not None:
            of_entries = self.use_sigmoid and weight.shape in (entries, (*rows, 1))
            self._check(cls_score, None if of_entries else rows, weight=weight)
        if self.use_sigmoid:
            return self._sigmoid(
                cls_score, label, weight, avg_factor, reduction_override, ignore_index
            )
        kept = _kept(label, ignore_index)
        if self.class_weight is not None:
            # Whatever class stands in for a label that is none, its row costs 0.
            of_label = self._weights_for(cls_score)[label.clamp(0, entries[-1] - 1)]
            weight = of_label if weight is None else weight * of_label
        return self._reduced(
            distribution.two_bin,
            cls_score,
            label.masked_fill(~kept, -1),
            None,
            None,
            weight=weight,
            avg_factor=self._divisor(avg_factor, reduction_override, kept, label.numel()),
            override=reduction_override,
        )

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

    def _divisor(
        self,
        avg_factor: float | Tensor | None,
        override: str | None,
        kept: Tensor,
        n_losses: int,
    ) -> float | Tensor | None:
        """`avg_factor`; or with `avg_non_ignore`, how many of the losses a mean is over."""
        reduction = self.reduction if override is None else override
        if avg_factor is not None or not self.avg_non_ignore or reduction != "mean":
            return avg_factor
        return kept.sum() * (n_losses // max(kept.numel(), 1))

    def _sigmoid(
        self,
        score: Tensor,
        label: Tensor,
        weight: Tensor | None,
        avg_factor: float | Tensor | None,
        override: str | None,
        ignore_index: int,
    ) -> Tensor:
        """Entry by entry where a target or weight of each entry is given, else row by row."""
        kept = _kept(label, ignore_index)
        dense = label.dim() == score.dim()
        each = (override or self.reduction) == "none"
        if self.class_weight is None and not dense and not each and _is_row(weight, label):
            return self._reduced(
                classification.binary_cross_entropy,
                score,
                label,
                None,
                None,
                weight=kept if weight is None else weight * kept,
                avg_factor=self._divisor(avg_factor, override, kept, score.numel()),
                count=score.numel(),
                override=override,
            )
        if dense:
            target = label.detach()
        else:
            classes = torch.arange(score.shape[-1], device=score.device)
            target = (label.unsqueeze(-1) == classes).to(torch.float32)
        kept = _by_entry(kept, score)
        weight = kept if weight is None else _by_entry(weight.detach(), score) * kept
        rest: dict[str, Any] = {
            "avg_factor": self._divisor(avg_factor, override, kept, score.numel()),
            "override": override,
        }
        op, x = classification.binary_cross_entropy, score.unsqueeze(-1)
        loss = self._reduced(op, x, None, target, None, weight=weight, **rest)
        if self.class_weight is not None:
            # pos_weight multiplies the positive part t softplus(-x) = t BCE(x, 1) only.
            extra = self._weights_for(score) - 1
            weight = weight * target * extra
            loss = loss + self._reduced(
                op, x, None, torch.ones_like(target), None, weight=weight, **rest
            )
        return loss


def _kept(label: Tensor, ignore_index: int) -> Tensor:
    """Where a label or a target counts: a negative one never does."""
    kept = label >= 0
    return kept if ignore_index < 0 else kept & (label != ignore_index)


def _by_entry(x: Tensor, score: Tensor) -> Tensor:
    """A factor of rows, or of entries, as one of each entry."""
    return (x.unsqueeze(-1) if x.dim() < score.dim() else x).expand_as(score)


def _is_row(weight: Tensor | None, label: Tensor) -> bool:
    return weight is None or weight.dim() == label.dim()


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
        reduction = self.reduction if reduction_override is None else reduction_override
        check_reduction(reduction)
        rows = pred.shape[:-1]
        self._check(pred, rows, targets=targets)
        targets = self._labels("targets", targets)
        if weight is not None:
            by_entry = reduction == "none" and weight.shape == pred.shape
            self._check(pred, None if by_entry else rows, weight=weight)
        if valid_label_mask is not None:
            by_row = valid_label_mask.shape == (*rows, 1)
            self._check(pred, None if by_row else pred.shape, valid_label_mask=valid_label_mask)
            valid_label_mask = valid_label_mask.expand(pred.shape)
        rest: dict[str, Any] = {"alpha": self.alpha, "gamma": self.gamma}
        if reduction == "none":
            classes = torch.arange(pred.shape[-1], device=pred.device)
            one_hot = (targets.unsqueeze(-1) == classes).to(torch.float32)
            if weight is not None:
                weight = (weight if by_entry else weight.unsqueeze(-1)).expand(pred.shape)
            if valid_label_mask is not None:
                weight = valid_label_mask if weight is None else weight * valid_label_mask
            inputs = (pred.unsqueeze(-1), None, one_hot, None)
            return self._reduced(
                classification.sigmoid_focal, *inputs, weight=weight, override="none", **rest
            )
        return self._reduced(
            classification.sigmoid_focal,
            pred,
            targets,
            None,
            valid_label_mask,
            weight=weight,
            avg_factor=avg_factor if reduction == "mean" else None,
            avg_eps=0.0,
            count=pred.numel(),
            override=reduction,
            **rest,
        )


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
        if weight is not None:
            self._check(pred, pred.shape[:-1], weight=weight)
        if self.activated:
            pred = _logit(pred)
        rest: dict[str, Any] = {
            "weight": weight,
            "avg_factor": avg_factor,
            "override": reduction_override,
            "beta": self.beta,
        }
        if isinstance(target, (tuple, list)):
            if len(target) != 2:
                raise ValueError(f"target must be (label, score), got {len(target)} entries")
            label, score = target
            self._check(pred, pred.shape[:-1], label=label, score=score)
            label = self._labels("label", label)
            return self._reduced(classification.quality_focal, pred, label, score, None, **rest)
        self._check(pred, pred.shape, target=target)
        if weight is not None:
            rest["weight"] = weight.unsqueeze(-1).expand(pred.shape)
        losses = self._reduced(
            classification.quality_focal,
            pred.unsqueeze(-1),
            None,
            target,
            None,
            count=pred.shape[:-1].numel(),
            **rest,
        )
        return losses.sum(-1) if losses.dim() > 0 else losses


def _logit(p: Tensor) -> Tensor:
    """Logits of probabilities, finite at 0 and 1 in float32."""
    p = at_least_float32(p)
    return p.clamp(min=torch.finfo(p.dtype).tiny).log() - torch.log1p(-p.clamp(max=1 - EPS32 / 2))


class _BoxLoss(Loss):
    """Losses of box pairs: one loss per pair."""

    def _pairs(
        self,
        op: Any,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        avg_factor: float | Tensor | None,
        override: str | None,
        **params: Any,
    ) -> Tensor:
        if pred.shape[-1:] != (4,):
            raise ValueError(
                f"{type(self).__name__}: pred must have shape (..., 4), got {tuple(pred.shape)}"
            )
        self._check(pred, pred.shape, target=target)
        if weight is not None:
            of_sides = weight.shape == pred.shape
            self._check(pred, None if of_sides else pred.shape[:-1], weight=weight)
            weight = at_least_float32(weight).mean(-1) if of_sides else weight
        return self._reduced(
            op,
            pred,
            target,
            weight=weight,
            avg_factor=avg_factor,
            override=override,
            **params,
        )


class IoULoss(_BoxLoss):
    """-log IoU ("log"), 1 - IoU^2 ("square") or 1 - IoU ("linear"), with the IoU at least eps.

    Args:
        linear: the same as mode="linear".
        eps: floor of the IoU.
    """

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
        return self._pairs(
            regression.iou_loss,
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            mode=self.mode,
            eps=self.eps,
        )


class GIoULoss(_BoxLoss):
    """1 - GIoU (Rezatofighi et al., 2019), union and hull at least eps."""

    def __init__(
        self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0
    ) -> None:
        super().__init__(reduction, loss_weight)
        self.eps = eps

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of box pairs. Shapes: as `IoULoss`."""
        return self._pairs(
            regression.giou_loss,
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            eps=self.eps,
        )


class L1Loss(Loss):
    """|pred - target|, one loss per coordinate."""

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
        self._check(pred, pred.shape, target=target)
        if weight is not None:
            by_row = weight.shape == pred.shape[:-1]
            self._check(pred, None if by_row else pred.shape, weight=weight)
            weight = weight.unsqueeze(-1).expand(pred.shape) if by_row else weight
        return self._reduced(
            regression.l1,
            pred.unsqueeze(-1),
            target.unsqueeze(-1),
            weight=weight,
            avg_factor=avg_factor,
            override=reduction_override,
        )


class BCELoss(nn.Module):
    """YOLOv9's classification loss: the sum of binary cross-entropies over the sum of targets."""

    def forward(self, predicts_cls: Tensor, targets_cls: Tensor, cls_norm: Tensor) -> Tensor:
        """Shapes: predicts_cls (B, A, C) logits, targets_cls (B, A, C) in [0, 1], cls_norm ()."""
        inputs = (predicts_cls.unsqueeze(-1), None, targets_cls.detach(), None)
        return classification.binary_cross_entropy(*inputs) / cls_norm


def _matched(module: nn.Module, valid_masks: Tensor, box_norm: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, weights) of the anchors that are matched, as many as box_norm has rows.

    Raises:
        ValueError: where a CPU sees that another number is matched.
    """
    mask = valid_masks.flatten()
    check_count(type(module).__name__, "valid_masks", mask, "box_norm", len(box_norm))
    index = first_set(mask, n=len(box_norm))
    missing = index >= len(mask)
    return index.masked_fill(missing, 0), box_norm.detach().masked_fill(missing, 0)


class BoxLoss(nn.Module):
    """YOLOv9's box loss: 1 - CIoU of the matched anchors, weighted by their score."""

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
        index, weight = _matched(self, valid_masks, box_norm)
        return (
            regression.ciou_loss(
                predicts_bbox.reshape(-1, 4).index_select(0, index),
                targets_bbox.detach().reshape(-1, 4).index_select(0, index),
                weight=weight,
                eps=regression.YOLOV9_EPS,
                alpha_grad=True,
            )
            / cls_norm
        )


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
        check_shapes(
            type(self).__name__,
            **{"vec2box.anchor_grid": (self.vec2box.anchor_grid, ("A", 2))},
            targets_bbox=(targets_bbox, ("B", "A", 4)),
        )
        grid = self.vec2box.anchor_grid.to(arithmetic_dtype(targets_bbox))
        centre = grid / self.vec2box.scaler.unsqueeze(-1)
        index, weight = _matched(self, valid_masks, box_norm)
        distances = ltrb(centre.expand(len(targets_bbox), -1, -1), targets_bbox.detach())
        left, right_weight = distribution.two_bins(
            distances.reshape(-1, 4).index_select(0, index), self.reg_max
        )
        weight = weight / 4
        return (
            distribution.two_bin(
                predicts_anc.reshape(-1, *predicts_anc.shape[2:]).index_select(0, index),
                left,
                1 - right_weight,
                right_weight,
                weight=weight.unsqueeze(-1).expand(left.shape),
            )
            / cls_norm
        )
