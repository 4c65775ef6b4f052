"""What a criterion is called with, as it computes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import backend
from detloss_triton.engine.modes import is_compiling

# Signatures of arguments that have passed a check: a few sizes of images, and counts of boxes.
_KEPT = 256


def once(*attributes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a method that checks arguments do so once for all of the same signature.

    It may look at types, shapes and devices, and of the object at its class and these attributes,
    where it has them.
    """

    def declare(check: Callable[..., None]) -> Callable[..., None]:
        passed: dict[Hashable, None] = {}

        @functools.wraps(check)
        def checked(self: Any, *args: Any) -> None:
            key: Any = None
            if not is_compiling():
                key = (
                    type(self),
                    *[getattr(self, name, None) for name in attributes],
                    _signature(args),
                )
                try:
                    if key in passed:
                        return
                except TypeError:  # what cannot be hashed is looked at each time
                    key = None
            check(self, *args)
            if key is not None:
                if len(passed) >= _KEPT:
                    passed.clear()
                passed[key] = None

        return checked

    return declare


def _signature(value: Any) -> Any:
    """All but the numbers in tensors: no tensor is kept alive by it."""
    if isinstance(value, (list, tuple)):
        return tuple(
            [
                (x.shape, x.device, x.dtype) if isinstance(x, Tensor) else _signature(x)
                for x in value
            ]
        )
    # 1 and True are equal, and so are arrays that change.
    return (type(value), value) if isinstance(value, (int, float, str, type(None))) else []


def precision_of(criterion: nn.Module, **predictions: Any) -> torch.dtype:
    """What a criterion computes in: float64 where a prediction is float64, else float32.

    Raises:
        RuntimeError: for float64 where Triton kernels were asked for by name; it names the
            prediction.
    """
    dtype = torch.float32
    for name, value in predictions.items():
        for x in _tensors(value):
            if x.dtype == torch.float64:
                dtype = x.dtype
                backend.refuse_double(f"{type(criterion).__name__}: {name}", x.device)
    return dtype


def constants(value: Any, dtype: torch.dtype) -> Any:
    """Targets and weights as a criterion computes with them: without gradients, as it trains its
    predictions only, and no more precise than these, of which `precision_of` tells the dtype.

    Tensors in lists, tuples and dictionaries included; what need not change is passed through.
    """
    if isinstance(value, Tensor):
        value = value.detach() if value.requires_grad else value
        return value.to(dtype) if value.dtype == torch.float64 else value
    if isinstance(value, (list, tuple)):
        entries = [constants(entry, dtype) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if isinstance(value, Mapping):
        return {key: constants(entry, dtype) for key, entry in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)
