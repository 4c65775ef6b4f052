"""How what stands in a criterion's slots is called, and what `repr` shows of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])


def fused(method: _Method) -> _Method:
    """Mark a method that criteria may call on (batch, anchors) rows, with a weight of each.

    What a subclass, or an object, puts in its place has no mark, and is called as OTX calls it.
    """
    method.is_fused = True  # type: ignore[attr-defined]
    return method


def is_fused(x: Any, name: str) -> bool:
    """Whether an object's method is one that is marked as `fused`."""
    return name not in getattr(x, "__dict__", {}) and hasattr(
        getattr(type(x), name, None), "is_fused"
    )


def described(module: nn.Module, **fused: bool) -> str:
    """The arguments of a module's constructor that are plain values, as name=value.

    Args:
        fused: by slot, whether what stands there runs fused, or is called as OTX calls it.
    """
    names = inspect.signature(type(module).__init__).parameters
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    lines = [", ".join(f"{name}={value!r}" for name, value in values.items() if _is_plain(value))]
    for words, here in (("fused", True), ("called as by OTX", False)):
        slots = [slot for slot, is_fused in fused.items() if is_fused == here]
        lines += [f"{words}: {', '.join(slots)}"] if slots else []
    return "\n".join(line for line in lines if line)


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, Mapping, list, tuple))
