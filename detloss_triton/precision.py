"""What arithmetic is done in: half precision, integers and masks are for storage only."""

from __future__ import annotations

import torch
from torch import Tensor

# What kernels load and references convert as it is stored; torch computes with no other types.
READABLE = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is, else float32: sums and quotients of halves are too coarse."""
    has_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if has_double else torch.float32


def are_half(*tensors: Tensor | None) -> bool:
    """Whether one is, whose gradient must have its upstream factor before it is rounded."""
    return any(x is not None and x.dtype in (torch.float16, torch.bfloat16) for x in tensors)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, for less where that is x."""
    return x if x.dtype == dtype else x.to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x))


def as_values(x: Tensor) -> Tensor:
    """x as it is stored where an op can read that, which then computes in floating point; else,
    as eight-bit floats, in float32.
    """
    return x if x.dtype in READABLE else x.to(torch.float32)


def as_indices(x: Tensor) -> Tensor:
    """Labels as integers that no number of classes wraps: torch compares uint8 with 300 as 44."""
    return x if x.dtype in (torch.int32, torch.int64) else x.to(torch.int64)
