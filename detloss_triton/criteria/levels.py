"""What criteria over feature levels share: views of the levels, and calls of the user's modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import losses
from detloss_triton.precision import at_least_float32
from detloss_triton.reduction import EPS32
from detloss_triton.settings import is_fused
from detloss_triton.shapes import check_shapes
from detloss_triton.warn import not_traced


def is_ours(module: Any) -> bool:
    """Whether a module's forward is this library's and nobody listens: that of a subclass may be
    the user's own, and a hook expects what OTX calls the module with.

    Ours run fused, on (batch, anchors) rows; all others are called as OTX calls them. So is one
    that does not reduce its losses, as they are then handed out in the shape of what they are of.
    """
    return (
        isinstance(module, nn.Module)
        and type(module).__call__ is nn.Module.__call__
        and is_fused(module, "forward")
        and getattr(module, "reduction", "") != "none"
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a user has hooked into a module's call, forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_our_coder(coder: Any) -> bool:
    """Whether a coder's decode is this library's: it takes rows of any shape, and a weight."""
    return is_fused(coder, "decode")


def term_of(
    module: Any, *known: str, reduction: str = "mean"
) -> tuple[str, tuple[float, ...], float] | None:
    """(op, constants, factor) of a module with this reduction, if a fused op knows its name."""
    if not is_ours(module) or getattr(module, "reduction", "") != reduction:
        return None
    term = module.term()
    if term is None or term[0].partition(" ")[0] not in known:
        return None
    # A number may be a tensor, which is the same after it was changed in place.
    constants = tuple([x.item() if isinstance(x, Tensor) else x for x in term[1]])
    return term[0], constants, float(module.loss_weight)


def divisor_of(by: float | Tensor, device: torch.device) -> tuple[tuple[Tensor, ...], float]:
    """(tensor or none, number) as fused ops take a divisor; the host's is right beside any."""
    if isinstance(by, Tensor):
        return (by.to(device, non_blocking=True),), 1.0
    return (), by


BOX_TERMS = ("giou_loss", "iou_loss", "l1")

# What (sum / 1) of a module's losses is divided by.
ONE = 1 + EPS32


def ignores_labels(module: Any) -> bool:
    """Whether labels of -1 and -100 may be left out by a loss, as a cross-entropy does: to focal
    losses any label that is no class is background."""
    return not isinstance(module, (losses.CrossSigmoidFocalLoss, losses.QualityFocalLoss))


@not_traced
def _names(kind: Any, argument: str) -> bool:
    """Whether an argument has a name in a function's signature, or in the forward of a class or of
    one that it is derived from, whose arguments it may collect in **kwargs."""
    functions = [kind]
    if isinstance(kind, type):
        functions = [vars(c)["forward"] for c in kind.__mro__ if "forward" in vars(c)]
    try:
        return any(argument in inspect.signature(f).parameters for f in functions)
    except (TypeError, ValueError):  # written in C
        return False


def takes(module: Any, argument: str) -> bool:
    """Whether a module, or a function in its place, takes an argument by name."""
    named: bool = _names(type(module) if isinstance(module, nn.Module) else module, argument)
    return named


def refuse_overrides(criterion: nn.Module, *methods: str) -> None:
    """Raise TypeError for a method of OTX's that a user overrides and `forward` does not call."""
    for name in methods:
        if hasattr(criterion, name):
            raise TypeError(
                f"{type(criterion).__name__} overrides {name}, which forward does not call: it "
                "computes all levels and images at once; override forward, or scale the losses it "
                "returns"
            )


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


def as_given(levels: Sequence[Tensor], features: int) -> tuple[Tensor, ...]:
    """Levels as fused ops take them: a map with one anchor per cell as it is, others as rows."""
    return tuple([x if x.shape[1] == features else as_rows(x, features) for x in levels])


def class_loss(
    module: nn.Module,
    scores: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    **kwargs: Any,
) -> Tensor:
    """The classification loss of a level's (B, n) anchors; modules not ours get (B * n,) rows."""
    if is_ours(module):
        return module(scores, target, weight, **kwargs)

    def flat(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(flat(y) for y in x)
        return x.flatten(0, 1) if isinstance(x, Tensor) and x.dim() > 1 else x

    return module(
        flat(scores), flat(target), flat(weight), **{k: flat(v) for k, v in kwargs.items()}
    )


def at_positives(
    function: Callable[..., Tensor], blank: Tensor, positive: Tensor, *inputs: Tensor
) -> Tensor:
    """What a user's function makes of the positives of a level, laid over `blank` (B, n, ...).

    It gets the (P, ...) rows of its inputs, as from OTX, and is not called where there are none.
    """
    rows = [x[positive] for x in inputs]
    if len(rows[0]) == 0:
        return blank
    return blank.index_put((positive,), function(*rows).to(blank.dtype))


def of_positives(
    module: nn.Module,
    pred: Tensor,
    target: Tensor,
    positive: Tensor,
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A loss of the positives among (B, n) anchors, elsewhere `weight` is 0.

    Another library's module gets (P, ...) rows, as from OTX, which the host counts; without
    positives it is not called, and the loss is 0.
    """
    if is_ours(module):
        # Whatever background predicts is not looked at, so that its gradient is 0.
        blanked = pred.masked_fill(~(positive if pred.dim() == 2 else positive.unsqueeze(-1)), 0)
        return module(blanked, target, weight=positive if weight is None else weight, **kwargs)
    pred = pred[positive]
    if len(pred) == 0:
        return at_least_float32(pred).sum()
    if weight is not None:
        kwargs["weight"] = weight[positive]
    return module(pred, target[positive], **kwargs)


def check_maps(place: str, rows: Tensor, /, **maps: tuple[Any, int]) -> None:
    """Raise unless each map, a tensor with its number of features, has the anchors (N, n) of rows.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape, or device than that of the rows, the labels; all name the
            argument, what came and what was expected.
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
        check_device(place, name, x, rows)


def check_device(place: str, name: str, x: Tensor, labels: Tensor) -> None:
    """Raise ValueError for another device than that of the labels; a tensor of nothing is free."""
    if x.device != labels.device and x.numel() and labels.numel():
        raise ValueError(
            f"{place}: {name} must be on {labels.device} as the labels are, got {x.device}"
        )


def check_labels(criterion: nn.Module, labels: Sequence[Any]) -> tuple[int, list[str]]:
    """The number of images, and what an error about each level begins with."""
    places = [f"{type(criterion).__name__}, level {level}" for level in range(len(labels))]
    check_shapes(places[0], labels=(labels[0], ("N", "n")))
    for place, level in zip(places, labels, strict=True):
        if isinstance(level, Tensor):
            check_device(place, "labels", level, labels[0])
    return labels[0].shape[0], places


def check_levels(criterion: nn.Module, /, **levels: Sequence[Any]) -> None:
    """Raise unless every argument is a list of tensors of one common length, which is not 0."""
    name, lengths = type(criterion).__name__, {}
    for argument, value in levels.items():
        if not isinstance(value, (list, tuple)):
            kind = type(value).__name__
            raise TypeError(
                f"{name}: {argument} must be a list of tensors, one per level, got {kind}"
            )
        lengths[argument] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: all arguments must have one entry per level, got {lengths}")
    if not all(lengths.values()):
        raise ValueError(f"{name}: {', '.join(lengths)}: expected one entry per level, got none")
