"""What arithmetic is done in: half precision is for storage only."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all else: sums and quotients of halves are too coarse."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x))
