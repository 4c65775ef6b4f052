"""Shapes and devices of arguments, checked before any kernel runs; no value is read."""

from __future__ import annotations

import itertools
from types import EllipsisType
from typing import Any, TypeAlias

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
        if len(found) != len(dimensions) or any(
            size != wanted for size, wanted in zip(found, expected, strict=True)
        ):
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
