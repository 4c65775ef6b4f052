"""Shapes and devices of arguments, checked before any kernel runs; no value is read."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor


def check_shapes(place: str, /, **arguments: tuple[Any, tuple[str | int, ...]]) -> None:
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
    sizes: dict[str, int] = {}
    first: tuple[str, Tensor] | None = None
    for name, (x, dimensions) in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(x).__name__}")
        n_known = len(sizes)
        shape = x.shape
        expected = [
            sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            for dimension, size in zip(dimensions, shape, strict=False)
        ]
        if len(shape) != len(dimensions) or any(
            size != wanted for size, wanted in zip(shape, expected, strict=True)
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


def _of(dimensions: tuple[str | int, ...], sizes: dict[str, int]) -> str:
    """The shape in words: names of sizes, and where they are known the sizes."""
    names = ", ".join(map(str, dimensions))
    numbers = ", ".join(str(sizes.get(d, d) if isinstance(d, str) else d) for d in dimensions)
    return f"shape ({names})" + ("" if names == numbers else f" = ({numbers})")
