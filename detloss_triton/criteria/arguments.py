"""What a criterion is called with, as it computes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import backend


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
