"""The losses as functions.

Tensors come first, and everything else is keyword-only, but for `smooth_l1_loss`, which has OTX's
signature, and for what torchvision has too, which has torchvision's names and order.

- `inputs` are logits. They meet `targets`, a value for each entry, or `labels` and `scores`, a
  class and its value for each row.
- `boxes1` and `boxes2` are boxes xyxy, `pred` and `target` coordinates: either side may carry
  gradients.
- `weight` is a factor of each loss, of the shape that `reduction="none"` returns.
- `reduction` is "none", "mean" or "sum". A mean is over all losses, whatever they weigh.

Everything computes in float32 (float64 where a tensor is) and returns that, whatever the dtype:
half precision, integers and masks are for storage. Gradients come back in the input's dtype. Where
the reduction sums losses, they are never written out.

Every function raises TypeError for what is no tensor; ValueError for another reduction, for shapes
or devices that disagree, for labels that are not integers, and for targets, labels, scores or
weights that require a gradient, as none is defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .ops import regression
from .ops.assignment import linear_sum_assignment
from .ops.classification import (
    binary_cross_entropy,
    dense,
    iou_aware,
    matchability,
    quality_focal,
    sigmoid_focal,
    varifocal,
)
from .ops.distribution import two_bin, two_bins
from .reduction import reduced
from .shapes import Dimensions, check_shapes

__all__ = [
    "binary_cross_entropy_with_logits",
    "complete_box_iou_loss",
    "cross_entropy",
    "distance_box_iou_loss",
    "distribution_focal_loss",
    "generalized_box_iou_loss",
    "iou_aware_loss",
    "iou_loss",
    "l1_loss",
    "linear_sum_assignment",
    "matchability_aware_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "varifocal_loss",
]

_OPTIONAL = ("weight", "row_weight")
_CONSTANT = ("targets", "labels", "scores", *_OPTIONAL)


def _check(place: str, /, **arguments: tuple[Any, Dimensions]) -> None:
    """Raise unless the arguments fit each other; an error names the function and the argument."""
    given = {k: v for k, v in arguments.items() if v[0] is not None or k not in _OPTIONAL}
    check_shapes(place, **given)
    for name, (x, _) in given.items():
        if x.is_complex() or (name == "labels" and x.is_floating_point() and x.numel() > 0):
            expected = "integers" if name == "labels" else "real numbers"
            raise ValueError(f"{place}: {name} must hold {expected}, got {x.dtype}")
        if name in _CONSTANT and x.requires_grad:
            raise ValueError(f"{place}: no gradient is defined for {name}; detach it first")
        if x.dtype == torch.float64 and name not in _OPTIONAL:
            backend.refuse_double(f"{place}: {name}", x.device)


def _check_entries(place: str, /, **entries: Tensor | None) -> None:
    _check(place, **{name: (x, (...,)) for name, x in entries.items()})


def _check_rows(place: str, inputs: Tensor, /, **rows: Tensor | None) -> None:
    _check(place, inputs=(inputs, (..., "C")), **{name: (x, (...,)) for name, x in rows.items()})


def _check_boxes(place: str, boxes1: Tensor, boxes2: Tensor) -> None:
    _check(place, boxes1=(boxes1, (..., 4)), boxes2=(boxes2, (..., 4)))


def binary_cross_entropy_with_logits(
    inputs: Tensor, targets: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Binary cross-entropy of logits and soft targets: softplus(x) - x t.

    Shapes:
        inputs: any, logits. targets: the same, in [0, 1]. weight: the same, or None.
    """
    place = "binary_cross_entropy_with_logits"
    _check_entries(place, inputs=inputs, targets=targets, weight=weight)
    entries = dense(inputs, targets)
    return reduced(binary_cross_entropy, *entries, weight=weight, reduction=reduction)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Focal loss (Lin et al., 2017, https://arxiv.org/abs/1708.02002), as torchvision's.

    a_t (1 - p_t)^gamma BCE(x, t), p_t the probability of the target, a_t = alpha or 1 - alpha.

    Args:
        alpha: weight of positives in [0, 1]; negative for none.
        gamma: exponent, >= 0.

    Shapes:
        inputs: any, logits. targets: the same, 0 or 1 (values between are interpolated).
    """
    _check_entries("sigmoid_focal_loss", inputs=inputs, targets=targets)
    entries = dense(inputs, targets)
    return reduced(sigmoid_focal, *entries, reduction=reduction, alpha=alpha, gamma=gamma)


def quality_focal_loss(
    inputs: Tensor, labels: Tensor, scores: Tensor, *, beta: float = 2.0, reduction: str = "none"
) -> Tensor:
    """Quality focal loss (Li et al., 2020, https://arxiv.org/abs/2006.04388), summed over classes.

    BCE(x, t) |t - p|^beta, t the score at the label and 0 elsewhere.

    Shapes:
        inputs: (..., C) logits. labels: (...,) int, outside [0, C) for background.
        scores: (...,) in [0, 1], the quality (IoU) of the prediction. Returns (...,) for "none".
    """
    _check_rows("quality_focal_loss", inputs, labels=labels, scores=scores)
    return reduced(quality_focal, inputs, labels, scores, None, reduction=reduction, beta=beta)


def varifocal_loss(
    inputs: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """Varifocal loss (Zhang et al., 2021, https://arxiv.org/abs/2008.13367), summed over classes.

    q BCE(x, q) at the label, alpha p^gamma BCE(x, 0) elsewhere; the factors carry no gradient.

    Shapes: as `quality_focal_loss`.
    """
    _check_rows("varifocal_loss", inputs, labels=labels, scores=scores)
    return reduced(
        varifocal, inputs, labels, scores, None, reduction=reduction, alpha=alpha, gamma=gamma
    )


def matchability_aware_loss(
    inputs: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 1.5,
    reduction: str = "none",
) -> Tensor:
    """Matchability-aware loss (Huang et al., 2024, https://arxiv.org/abs/2412.04234), summed over
    classes.

    BCE(x, q^gamma) at the label, alpha p^gamma BCE(x, 0) elsewhere; the factors carry no gradient.

    Shapes: as `quality_focal_loss`.
    """
    _check_rows("matchability_aware_loss", inputs, labels=labels, scores=scores)
    return reduced(
        matchability, inputs, labels, scores, None, reduction=reduction, alpha=alpha, gamma=gamma
    )


def iou_aware_loss(
    inputs: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """IoU-aware BCE (LW-DETR, Chen et al., 2024, https://arxiv.org/abs/2406.03459), summed over
    classes.

    BCE(x, max(p^alpha q^(1-alpha), 0.01)) at the label, its target a constant; p^gamma BCE(x, 0)
    elsewhere.

    Shapes: as `quality_focal_loss`.
    """
    _check_rows("iou_aware_loss", inputs, labels=labels, scores=scores)
    return reduced(
        iou_aware, inputs, labels, scores, None, reduction=reduction, alpha=alpha, gamma=gamma
    )


def cross_entropy(
    inputs: Tensor, labels: Tensor, *, row_weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Softmax cross-entropy of each row; a label outside [0, C) costs 0.

    torch's `weight`, a factor of each class, is `row_weight=class_weight[labels]` here; torch then
    divides a mean by the sum of these factors, which is
    `cross_entropy(..., reduction="sum") / row_weight.sum()`.

    Shapes:
        inputs: (..., C) logits. labels: (...,) int. row_weight: (...,) factor of each row, or None.
    """
    _check_rows("cross_entropy", inputs, labels=labels, row_weight=row_weight)
    return reduced(two_bin, inputs, labels, None, None, weight=row_weight, reduction=reduction)


def distribution_focal_loss(
    inputs: Tensor, targets: Tensor, *, weight: Tensor | None = None, reduction: str = "none"
) -> Tensor:
    """Distribution focal loss (Li et al., 2020, https://arxiv.org/abs/2006.04388).

    Cross-entropy with the two bins around a continuous target, weighted by nearness:
    -((r - y) log p[l] + (y - l) log p[r]), l = floor(y), r = l + 1.

    Shapes:
        inputs: (..., bins) logits. targets: (...,) in [0, bins - 1), clamped into it.
        weight: (...,), or None. Returns (...,) for "none".
    """
    _check_rows("distribution_focal_loss", inputs, targets=targets, weight=weight)
    left, of_right = two_bins(targets, inputs.shape[-1])
    return reduced(
        two_bin, inputs, left, 1 - of_right, of_right, weight=weight, reduction=reduction
    )


def iou_loss(
    boxes1: Tensor, boxes2: Tensor, *, mode: str = "log", eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """IoU loss: -log IoU (Yu et al., 2016), 1 - IoU^2 ("square") or 1 - IoU ("linear").

    The IoU is at least eps, so disjoint boxes cost -log(eps) at most, with no gradient.

    Shapes:
        boxes1, boxes2: (..., 4) boxes xyxy. Returns (...,) for "none".
    """
    _check_boxes("iou_loss", boxes1, boxes2)
    regression.check_iou_mode(mode)
    return reduced(regression.iou_loss, boxes1, boxes2, reduction=reduction, mode=mode, eps=eps)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """GIoU loss (Rezatofighi et al., 2019, https://arxiv.org/abs/1902.09630), in [0, 2].

    1 - IoU + (hull - union) / hull; union and hull at least eps.

    Shapes: as `iou_loss`.
    """
    _check_boxes("generalized_box_iou_loss", boxes1, boxes2)
    return reduced(regression.giou_loss, boxes1, boxes2, reduction=reduction, eps=eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """DIoU loss (Zheng et al., 2020, https://arxiv.org/abs/1911.08287).

    1 - IoU + squared centre distance / squared diagonal of the hull; eps is added to denominators.

    Shapes: as `iou_loss`.
    """
    _check_boxes("distance_box_iou_loss", boxes1, boxes2)
    return reduced(regression.diou_loss, boxes1, boxes2, reduction=reduction, eps=eps)


def complete_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    differentiate_alpha: bool = False,
) -> Tensor:
    """CIoU loss (Zheng et al., 2020, https://arxiv.org/abs/1911.08287).

    The DIoU loss + alpha v: v = 4 / pi^2 (difference of the aspect angles)^2,
    alpha = v / (1 - IoU + v).

    Args:
        differentiate_alpha: let gradients flow through alpha, as YOLOv9 does; torchvision and the
            paper hold it constant.

    Shapes: as `iou_loss`.
    """
    _check_boxes("complete_box_iou_loss", boxes1, boxes2)
    op, alpha_grad = regression.ciou_loss, differentiate_alpha
    return reduced(op, boxes1, boxes2, reduction=reduction, eps=eps, alpha_grad=alpha_grad)


def l1_loss(
    pred: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """|pred - target| of each entry. Shapes: pred, target, weight (or None): any, the same."""
    _check_entries("l1_loss", pred=pred, target=target, weight=weight)
    pred, target = pred.unsqueeze(-1), target.unsqueeze(-1)
    return reduced(regression.l1, pred, target, weight=weight, reduction=reduction)


def smooth_l1_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta (Girshick, 2015), of each entry.

    Args:
        avg_factor: with "mean", the divisor of the sum instead of the number of entries.
        beta: where the parabola ends, > 0.

    Shapes:
        pred, target, weight (or None): any, the same.
    """
    _check_entries("smooth_l1_loss", pred=pred, target=target, weight=weight)
    if not beta > 0:
        raise ValueError(f"smooth_l1_loss: beta must be positive, got {beta}")
    return reduced(
        regression.smooth_l1,
        pred.unsqueeze(-1),
        target.unsqueeze(-1),
        weight=weight,
        reduction=reduction,
        avg_factor=avg_factor,
        beta=beta,
    )
