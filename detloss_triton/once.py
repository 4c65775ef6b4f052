"""What is worked out once for all arguments of the same signature, and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .engine.modes import is_compiling

_Function = TypeVar("_Function", bound=Callable[..., Any])

_UNKNOWN = object()
# What is its own signature.
_PLAIN = (type(None), bool, int, float, str, torch.device)
# Signatures that are kept: a few sizes of images, and counts of boxes.
_KEPT = 256


def once(*attributes: str) -> Callable[[_Function], _Function]:
    """Have a function that checks its arguments do so once for all of the same signature, and
    answer the same from then on.

    It may look at types, shapes and devices; a method also at its object's class and at these
    attributes, where it has them. What it raises is not kept.
    """

    def declare(function: _Function) -> _Function:
        known: dict[Hashable, Any] = {}

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if is_compiling():
                return function(*args)
            given: Any = args
            if attributes:
                this, *given = args
                given.append(type(this))
                given += [getattr(this, name, None) for name in attributes]
            key = _signature(given)
            try:
                answer = known.get(key, _UNKNOWN)
            except TypeError:  # what cannot be hashed is looked at each time
                return function(*args)
            if answer is not _UNKNOWN:
                return answer
            answer = function(*args)
            if len(known) >= _KEPT:
                known.clear()
            known[key] = answer
            return answer

        return call  # type: ignore[return-value]

    return declare


def _signature(value: Any) -> Any:
    """All but the numbers in tensors: no tensor is kept alive by it."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # 1 and True are equal
    if kind is Tensor or isinstance(value, Tensor):
        return value.shape, value.device, value.dtype
    if isinstance(value, (list, tuple)):
        # What is met most often is looked at here, as calls take time.
        return tuple(
            [
                (x.shape, x.device, x.dtype)
                if type(x) is Tensor
                else x
                if x is None
                else _signature(x)
                for x in value
            ]
        )
    if isinstance(value, Mapping):
        return tuple([(key, _signature(entry)) for key, entry in value.items()])
    # Another object may change, as an array does: what has such a signature cannot be hashed.
    return [] if not isinstance(value, type) else value
