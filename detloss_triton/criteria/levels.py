"""What criteria over feature levels share: views of the levels, and calls of the user's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import losses
from detloss_triton.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from detloss_triton.precision import at_least_float32
from detloss_triton.reduction import EPS32
from detloss_triton.shapes import check_shapes


def is_ours(module: Any) -> bool:
    """Whether a module's forward is this library's and nobody listens: that of a subclass may be
    the user's own, and a hook expects what OTX calls the module with.

    Ours run fused, on (batch, anchors) rows; a stranger's is called as OTX calls it.
    """
    if not isinstance(module, nn.Module) or "forward" in module.__dict__ or has_hooks(module):
        return False
    # Not of the bound method: Dynamo of torch 2.11 takes its module for another object.
    name: str = type(module).forward.__module__
    return name == losses.__name__


def has_hooks(module: nn.Module) -> bool:
    """Whether a user has hooked into a module's call, forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def joined(levels: Sequence[Tensor]) -> Tensor:
    """(B, n_l, ...) of each level as one (B, n, ...), in float32 at least."""
    return at_least_float32(torch.cat(list(levels), 1))


def as_rows(x: Tensor, features: int) -> Tensor:
    """(B, anchors * features, H, W) as a (B, H * W * anchors, features) view: nothing is copied.

    A (B, n, features) tensor is returned as it is. With one anchor per cell the view is free;
    with more, rows are ordered cell by cell as the targets are, which takes a copy.
    """
    if x.dim() == 3:
        return x
    batch, channels, height, width = x.shape
    if channels == features:
        return x.flatten(2).transpose(1, 2)
    return x.permute(0, 2, 3, 1).reshape(batch, height * width * channels // features, features)


def of_all(
    module: nn.Module,
    scores: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    **kwargs: Any,
) -> Tensor:
    """A classification loss of all (B, n) anchors of a level; a stranger's gets (B * n,) rows."""
    if is_ours(module):
        return module(scores, target, weight, **kwargs)

    def flat(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(flat(y) for y in x)
        return x.flatten(0, 1) if isinstance(x, Tensor) and x.dim() > 1 else x

    return module(
        flat(scores), flat(target), flat(weight), **{k: flat(v) for k, v in kwargs.items()}
    )


def of_positives(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    positive: Tensor,
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A stranger's loss of the P positives among (B, n) anchors, which the host counts.

    It gets (P, ...) rows, as from OTX; without positives it is not called, and the loss is 0.
    """
    pred = pred[positive]
    if len(pred) == 0:
        return at_least_float32(pred).sum()
    if weight is not None:
        kwargs["weight"] = weight[positive]
    return module(pred, target[positive], **kwargs)


def ours_by_level(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    *,
    weight: Tensor,
    avg_factor: float | Tensor,
) -> list[Tensor]:
    """Our module's loss of each level, from joined (B, n) rows with `sizes` anchors per level."""
    if module.reduction == "mean":
        each = module(pred, target, weight=weight, reduction_override="none")
        return [level.sum() / (avg_factor + EPS32) for level in each.split(sizes, 1)]
    levels = zip(*(x.split(sizes, 1) for x in (pred, target, weight)), strict=True)
    return [module(p, t, weight=w, avg_factor=avg_factor) for p, t, w in levels]


def boxes_by_level(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    sizes: Sequence[int],
    *,
    positive: Tensor,
    weight: Tensor,
    norm: Tensor,
) -> list[Tensor]:
    """The box loss of each level over `norm`, from joined (B, n) rows; `weight` 0 off positives."""
    if is_ours(module):
        # Weights are normalised, not losses: gradients are then right as they are found.
        return ours_by_level(module, pred, target, sizes, weight=weight / norm, avg_factor=1.0)
    levels = zip(*(x.split(sizes, 1) for x in (pred, target, positive, weight)), strict=True)
    return [of_positives(module, *level, avg_factor=1.0) / norm for level in levels]


def decoded(coder: Any, anchors: Tensor, codes: Tensor, used: Tensor | None = None) -> Tensor:
    """Boxes from (B, n, 4) codes: our coders take them as they are, a stranger's as flat rows.

    Codes that are not `used` (B, n), a mask in numbers, are not looked at.
    """
    if isinstance(coder, (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)):
        return coder.decode(anchors, codes, weight=used)
    if used is not None:
        codes = torch.where(used.bool().unsqueeze(-1), codes, 0)
    return coder.decode(anchors.flatten(0, 1), codes.flatten(0, 1)).view_as(codes)


def check_maps(place: str, rows: Tensor, /, **maps: tuple[Any, int]) -> None:
    """Raise unless each map, a tensor with its number of features, has the anchors (N, n) of rows.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape; both name the argument, what came and what was expected.
    """
    images, n = rows.shape
    for name, (x, features) in maps.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() == 4:
            _, channels, height, width = x.shape
            fits = channels % features == 0 and channels * height * width == n * features
        else:
            fits = x.dim() == 3 and x.shape[1] == n and x.shape[2] == features
        if not fits or x.shape[0] != images:
            raise ValueError(
                f"{place}: {name} must have shape (N, k * {features}, H, W) with N = {images} and "
                f"k * H * W = {n}, or (N, n, {features}) = ({images}, {n}, {features}), "
                f"got {tuple(x.shape)}"
            )


def check_images(criterion: nn.Module, labels: Sequence[Any]) -> tuple[int, list[str]]:
    """The number of images, and what an error about each level begins with."""
    places = [f"{type(criterion).__name__}, level {level}" for level in range(len(labels))]
    check_shapes(places[0], labels=(labels[0], ("N", "n")))
    return labels[0].shape[0], places


def check_levels(**levels: Sequence[Any]) -> None:
    """Raise unless every argument is a list of tensors of one common length, which is not 0."""
    lengths = {}
    for name, value in levels.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one per level, got {type(value)}")
        lengths[name] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all arguments must have one entry per level, got {lengths}")
    if not all(lengths.values()):
        raise ValueError(f"{', '.join(lengths)}: expected one entry per level, got none")


def is_positive(labels: Tensor, num_classes: int) -> Tensor:
    """Where a label is an object's: in [0, num_classes)."""
    return (labels >= 0) & (labels < num_classes)
