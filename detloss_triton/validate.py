"""Checks of values, off unless asked for: to look at a value is to wait for the device.

`DETLOSS_VALIDATE=1` turns them on; it is read once, at import, and a word that is no answer is
refused when a criterion asks. A criterion states what its arguments must hold, by `check` behind
`if enabled()`: off, that is all there is of it, in eager mode as in a compiled graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .engine import host_sees

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_asked = os.environ.get("DETLOSS_VALIDATE", "")
_word = _asked.strip().lower()
_enabled: bool | None = _word in _ON if _word in _ON + _OFF else None


def check_environment() -> None:
    """Raise ValueError where DETLOSS_VALIDATE says neither on nor off, nor has `validation`."""
    if _enabled is None:
        words = ", ".join((*_ON, *_OFF[:-1]))
        raise ValueError(f"DETLOSS_VALIDATE must be one of {words}, or empty, got {_asked!r}")


def enabled() -> bool:
    """Whether values are checked.

    Raises:
        ValueError: where the environment says neither on nor off.
    """
    check_environment()
    return bool(_enabled)


def validation(on: bool) -> ExitStack:
    """Turn the checks of values on or off from here on; as a context manager, until its end."""
    restore = ExitStack()
    restore.callback(_enable, _enabled)
    _enable(on)
    return restore


def _enable(on: bool | None) -> None:
    global _enabled
    _enabled = on


def may_read(device: torch.device) -> bool:
    """Whether to look at values there: validation is on, or the host sees them without waiting."""
    return enabled() or host_sees(device)


def check_count(place: str, name: str, mask: Tensor, counted: str, n: int) -> None:
    """Raise ValueError unless so many entries of a mask are set, where the host sees it."""
    if host_sees(mask.device) and (n_set := int(mask.count_nonzero())) != n:
        raise ValueError(
            f"{place}: {name} must have as many entries set as {counted} has rows, {n}, got {n_set}"
        )


@dataclass(frozen=True)
class Rule:
    """What values must be, in words, and where they are not. Called, it is laid on an argument.

    Args:
        wrong: of a tensor (*rows, features), a mask (*rows, features) or (*rows,).
    """

    expected: str
    wrong: Callable[[Tensor], Tensor]

    def __call__(self, value: Any, used: Any = None, positives: Tensor | None = None) -> Values:
        return Values(self, value, used, positives)


@dataclass(frozen=True)
class Values:
    """An argument's values, the rule for them, and which of them it concerns.

    Args:
        value: a tensor whose first dimension is the images, a number, a sequence of them over
            levels, or a mapping from places to them.
        used: where nonzero the rule holds; as `value`, of its shape or of that of its rows. By
            default everywhere.
        positives: (images, anchors) mask whose entries that are set are the value's rows, in order.
    """

    rule: Rule
    value: Any
    used: Any = None
    positives: Tensor | None = None


def check(criterion: nn.Module, **arguments: Values) -> None:
    """Raise at the first value that breaks its rule.

    Raises:
        ValueError: it names criterion, argument, level or layer, image, and the value.
    """
    for name, values in arguments.items():
        for place, value, used in _placed(name, values.value, values.used):
            _check(f"{type(criterion).__name__}: {place}", value, used, values)


def _placed(place: str, value: Any, used: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Every tensor of a tree with the words that lead to it."""
    if isinstance(value, Mapping):
        parts = [(f"{place}, {key}", key) for key in value]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{place}, level {i}", i) for i in range(len(value))]
    else:
        yield place, torch.as_tensor(value).detach(), used
        return
    for here, key in parts:
        yield from _placed(here, value[key], None if used is None else used[key])


def _check(place: str, value: Tensor, used: Tensor | None, values: Values) -> None:
    wrong = values.rule.wrong(value)
    if used is not None:
        used = used.detach() != 0
        wrong = wrong & used[(..., *[None] * (wrong.dim() - used.dim()))]
    if not wrong.any():
        return
    index = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(
        f"{place}{_image_and_entry(index, value, values.positives)}: "
        f"expected {values.rule.expected}, got {value[index].tolist()}"
    )


def _image_and_entry(index: tuple[int, ...], value: Tensor, positives: Tensor | None) -> str:
    if positives is not None:
        image = positives.nonzero()[index[0], 0].item()
        return f", image {image}, positive {index[0]}"
    # A single number belongs to the batch.
    if value.numel() == 1 and value.dim() < 2:
        return ""
    return f", image {index[0]}" + (f", entry {list(index[1:])}" if index[1:] else "")


def _is_no_box(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    finite = (x1 - x1 + y1 - y1 + x2 - x2 + y2 - y2) == 0
    return ~(finite & (x2 >= x1) & (y2 >= y1))


def _are_apart(x: Tensor) -> Tensor:
    box, anchor = x.split(4, -1)
    return ((box[..., :2] > anchor[..., 2:]) | (anchor[..., :2] > box[..., 2:])).any(-1)


# Rounding may move a box's side out of the image by so much of it.
_ROUNDING = 0.01
# Boxes of data that does not clip them leave the image: one by up to its size, and those that look
# like corners together by a tenth of it.
_FAR, _TOGETHER = 1.0, 0.1


def _outside(x: Tensor) -> Tensor:
    """How far the farthest side of a box normalised cxcywh lies outside the image; 0 inside."""
    low, high = x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2
    return torch.maximum(-low, high - 1).amax(-1).clamp(min=0)


def _is_no_size(x: Tensor) -> Tensor:
    is_size = x.isfinite().all(-1) & (x[..., 2:] >= 0).all(-1)
    return ~(is_size & (_outside(x) <= _FAR))


FINITE = Rule("a finite number", lambda x: ~x.isfinite())
NOT_NEGATIVE = Rule("a finite number, at least 0", lambda x: ~(x.isfinite() & (x >= 0)))
NOT_ZERO = Rule("a finite number other than 0", lambda x: ~(x.isfinite() & (x != 0)))
POSITIVE = Rule("a finite number above 0", lambda x: ~(x.isfinite() & (x > 0)))
# An IoU, or what is made of one, may round to a little more than 1.
FRACTION = Rule("a number in [0, 1]", lambda x: ~((x >= 0) & (x <= 1.001)))
NOTHING = Rule("0, as the label is no class", lambda x: x != 0)
# Boxes without area are legal: data sets have them, and the losses take them.
XYXY = Rule("finite x1, y1, x2, y2 with x2 >= x1 and y2 >= y1", lambda x: _is_no_box(*x.unbind(-1)))
# Of the eight numbers of both, as they fail in other units than each other's.
MEETS_ANCHOR = Rule("a box that meets its anchor, given after it", _are_apart)
CXCYWH = Rule(
    "normalised cx, cy, w, h, finite, with w >= 0 and h >= 0 and all sides in [-1, 2]", _is_no_size
)
NORMALISED = Rule(
    "a coordinate of a box normalised cxcywh, in [0, 1]",
    lambda x: ~((x >= -_ROUNDING) & (x <= 1 + _ROUNDING)),
)
# D-FINE's bins move a side of a box by up to twice the box's size, either way.
DECODED = Rule(
    "a coordinate of a box normalised cxcywh, in [-1, 3]", lambda x: ~((x >= -1) & (x <= 3))
)

# Boxes in units of their image are not larger, also where they stick out of it by its size.
_LARGEST = 2

# What anchors that teach nothing are labelled with, here and elsewhere.
IGNORED_LABELS = (-1, -100)


def a_class(n_classes: int) -> Rule:
    return Rule(f"a label in [0, {n_classes})", lambda x: (x < 0) | (x >= n_classes))


def a_class_or_background(n_classes: int, ignores: bool = True) -> Rule:
    """Args: ignores: whether the loss leaves out IGNORED_LABELS, or takes them as background."""
    if not ignores:
        return Rule(
            f"a label in [0, {n_classes}), or {n_classes} for background, where label_weights is "
            "not 0",
            lambda x: (x < 0) | (x > n_classes),
        )
    ignored = ", ".join(map(str, IGNORED_LABELS))
    return Rule(
        f"a label in [0, {n_classes}), {n_classes} for background, or {ignored} to ignore it",
        lambda x: ((x < 0) | (x > n_classes)) & (x != IGNORED_LABELS[0]) & (x != IGNORED_LABELS[1]),
    )


def a_box_with_class(n_classes: int) -> Rule:
    """Of rows [class, x1, y1, x2, y2]."""

    def wrong(x: Tensor) -> Tensor:
        label, *box = x.unbind(-1)
        is_class = (label >= 0) & (label < n_classes) & (label == label.floor())
        return (label != -1) & (~is_class | _is_no_box(*box))

    return Rule(
        f"[class, x1, y1, x2, y2] with a class in [0, {n_classes}), finite, x2 >= x1 and y2 >= y1, "
        "or a class of -1",
        wrong,
    )


def in_pixels(n_classes: int) -> Rule:
    """Of rows [class, x1, y1, x2, y2] of a batch; boxes without area may stand anywhere."""

    def wrong(x: Tensor) -> Tensor:
        label, x1, y1, x2, y2 = x.unbind(-1)
        is_box = (label >= 0) & (label < n_classes) & (x2 > x1) & (y2 > y1)
        is_large = is_box & (x[..., 1:].abs() > _LARGEST).any(-1)
        return is_box & ~is_large.any()

    return Rule(
        f"boxes in pixels, of which some in the batch reach beyond {_LARGEST}; normalised boxes "
        "must be multiplied by the image's width and height",
        wrong,
    )


def no_corners(is_box: Tensor) -> Rule:
    """Of a batch of boxes normalised cxcywh, those that are used: that they are not xyxy.

    Read as cx, cy, w, h, corners have w >= cx and h >= cy in every box, and many leave the image.
    Boxes that lie in the image are never refused, nor a batch of which one box has w < cx.
    """

    def wrong(x: Tensor) -> Tensor:
        like_corners = (x[..., 2:] >= x[..., :2]).all(-1) | ~is_box
        outside = torch.where(is_box, (_outside(x) - _ROUNDING).clamp(min=0), 0)
        return (outside > 0) & like_corners.all() & (outside.sum() > _TOGETHER)

    return Rule(
        "normalised cx, cy, w, h; all boxes of the batch have w >= cx and h >= cy, as corners "
        "x1, y1, x2, y2 have, and this one leaves the image",
        wrong,
    )


def at_most(highest: int, of: str) -> Rule:
    return Rule(f"0 to {highest} {of}", lambda x: (x < 0) | (x > highest))


def exactly(n: int, of: str) -> Rule:
    return Rule(f"{n} {of}", lambda x: x != n)


def a_query_per_box(n_queries: int, counts: Tensor) -> Rule:
    """Of queries (B, groups, T), padded with -1 beyond an image's count (B,)."""

    def wrong(x: Tensor) -> Tensor:
        is_box = torch.arange(x.shape[2], device=x.device) < counts.view(-1, 1, 1)
        return torch.where(is_box, (x < 0) | (x >= n_queries), x != -1)

    return Rule(f"a query in [0, {n_queries}) for each box of the image, -1 beyond", wrong)
