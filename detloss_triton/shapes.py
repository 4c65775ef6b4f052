"""Shapes, devices and kinds of arguments, checked before any kernel runs; no device is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from numbers import Integral, Real
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Sizes, or names of sizes; `...` in front stands for any number of leading dimensions.
Dimensions: TypeAlias = "tuple[str | int | EllipsisType, ...]"


def check_shapes(place: str, /, **arguments: tuple[Any, Dimensions]) -> None:
    """Raise unless every argument is a tensor of the shape that stands beside it, on one device.

        check_shapes("SSDCriterion", labels=(labels, ("N", "A")), bbox_pred=(boxes, ("N", "A", 4)))

    Args:
        place: what an error begins with, the criterion and where it matters the level.
        arguments: a tensor and its dimensions: sizes, or names of sizes, each of which is the same
            throughout; the first argument that has it says what it is. A tensor without elements
            may be on any device.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape, or device than the first's; all name the argument, what came
            and what was expected.
    """
    sizes: dict[Any, Any] = {}
    first: tuple[str, Tensor] | None = None
    for name, (x, dimensions) in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(x).__name__}")
        n_known = len(sizes)
        shape = x.shape
        found: tuple[Any, ...] = shape
        if dimensions and dimensions[0] is ...:
            n_leading = max(len(shape) - len(dimensions) + 1, 0)
            found = (shape[:n_leading], *shape[n_leading:])
        expected = [
            dimension if isinstance(dimension, int) else sizes.setdefault(dimension, size)
            for dimension, size in zip(dimensions, found, strict=False)
        ]
        if list(found) != expected or len(found) != len(dimensions):
            known = dict(itertools.islice(sizes.items(), n_known))
            raise ValueError(
                f"{place}: {name} must have {_of(dimensions, known)}, got {tuple(shape)}"
            )
        if x.numel() == 0:
            continue
        first = first or (name, x)
        if x.device != first[1].device:
            raise ValueError(
                f"{place}: {name} must be on {first[1].device} as {first[0]} is, got {x.device}"
            )


def _of(dimensions: Dimensions, sizes: dict[Any, Any]) -> str:
    """The shape in words: names of sizes, and where they are known the sizes."""
    names = ", ".join("..." if d is ... else str(d) for d in dimensions)
    known: list[Any] = []
    for dimension in dimensions:
        size = sizes.get(dimension, "..." if dimension is ... else dimension)
        known += size if isinstance(size, tuple) else [size]
    numbers = ", ".join(map(str, known))
    return f"shape ({names})" + ("" if names == numbers else f" = ({numbers})")


def check_mapping(place: str, /, **arguments: Any) -> None:
    """Raise TypeError unless every argument is a dictionary."""
    for name, value in arguments.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{place}: {name} must be a dictionary, got {type(value).__name__}")


def check_numbers(place: str, /, **arguments: Any) -> None:
    """Raise TypeError unless every argument is a number, or a tensor of one; a flag is none."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            is_number = value.numel() == 1 and value.dtype != torch.bool
        else:
            # `Real` are NumPy's numbers too.
            is_number = isinstance(value, (int, float, Real)) and not isinstance(value, bool)
        if not is_number:
            raise TypeError(f"{place}: {name} must be a number, got {_named(value)}")


def check_counts(place: str, least: int, /, **arguments: Any) -> None:
    """Raise TypeError unless every argument is an integer, ValueError if it is below the least."""
    for name, value in arguments.items():
        if not isinstance(value, (int, Integral)) or isinstance(value, bool):
            raise TypeError(f"{place}: {name} must be an integer, got {_named(value)}")
        if value < least:
            raise ValueError(f"{place}: {name} must be at least {least}, got {value}")


def _named(value: Any) -> str:
    """A value that is of the wrong kind, in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value) if isinstance(value, (bool, str, float)) else type(value).__name__
