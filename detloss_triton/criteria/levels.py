"""What criteria over feature levels share: views of the levels, and calls of the user's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from detloss_triton.losses import Loss
from detloss_triton.reduction import EPS32


def as_rows(x: Tensor, features: int) -> Tensor:
    """(B, anchors * features, H, W) as a (B, H * W * anchors, features) view: nothing is copied.

    A (B, n, features) tensor is returned as it is. With one anchor per cell the view is free;
    with more, rows are ordered cell by cell as the targets are, which takes a copy.
    """
    if x.dim() == 3:
        return x
    if x.dim() != 4 or x.shape[1] % features:
        raise ValueError(
            f"expected a level of shape (B, k * {features}, H, W) or (B, n, {features}), "
            f"got {tuple(x.shape)}"
        )
    batch, channels, height, width = x.shape
    if channels == features:
        return x.flatten(2).transpose(1, 2)
    return x.permute(0, 2, 3, 1).reshape(batch, height * width * channels // features, features)


def run(module: nn.Module, pred: Tensor, target: Any, **kwargs: Any) -> Tensor:
    """Call a loss module: ours on (batch, anchors) rows in place, a stranger's on flat rows."""
    if isinstance(module, Loss):
        return module(pred, target, **kwargs)

    def flat(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(flat(y) for y in x)
        return x.reshape(-1, *x.shape[2:]) if isinstance(x, Tensor) and x.dim() > 1 else x

    return module(flat(pred), flat(target), **{k: flat(v) for k, v in kwargs.items()})


def run_by_level(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    *,
    weight: Tensor,
    avg_factor: float | Tensor,
) -> list[Tensor]:
    """A loss of each level, from joined (batch, anchors) rows with `sizes` anchors per level.

    Ours evaluates all levels at once.
    """
    if isinstance(module, Loss) and module.reduction == "mean":
        each = module(pred, target, weight=weight, reduction_override="none")
        return [level.sum() / (avg_factor + EPS32) for level in each.split(sizes, 1)]
    levels = zip(*(x.split(sizes, 1) for x in (pred, target, weight)), strict=True)
    return [run(module, p, t, weight=w, avg_factor=avg_factor) for p, t, w in levels]


def decoded(coder: Any, anchors: Tensor, codes: Tensor, used: Tensor | None = None) -> Tensor:
    """Boxes from (B, n, 4) codes: our coders take them as they are, a stranger's as flat rows.

    Codes that are not `used` (B, n), a mask in numbers, are not looked at.
    """
    if isinstance(coder, (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)):
        return coder.decode(anchors, codes, weight=used)
    if used is not None:
        codes = torch.where(used.bool().unsqueeze(-1), codes, 0)
    return coder.decode(anchors.flatten(0, 1), codes.flatten(0, 1)).view_as(codes)


def check_levels(**levels: Sequence[Any]) -> None:
    """Raise unless every argument is a list of tensors of one common length."""
    lengths = {}
    for name, value in levels.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one per level, got {type(value)}")
        lengths[name] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all arguments must have one entry per level, got {lengths}")


def is_positive(labels: Tensor, num_classes: int) -> Tensor:
    """Where a label is an object's: in [0, num_classes)."""
    return (labels >= 0) & (labels < num_classes)
