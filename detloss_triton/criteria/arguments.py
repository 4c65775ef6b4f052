"""What a criterion is called with, as it takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def detached(value: Any) -> Any:
    """Targets and weights without their gradients: a criterion trains its predictions only.

    Tensors in lists, tuples and dictionaries included; what requires no gradient is passed through.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, Mapping):
        return {key: detached(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [detached(entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
