"""Gradients that are mostly zeros, by large tensors on a CPU of which few rows count."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend

from . import modes
from .operators import opaque

# Bytes from which on glibc asks the system for new memory each time, and it pays.
_LARGE = 2**25


def _is_large(x: Tensor) -> bool:
    return x.numel() * x.element_size() >= _LARGE and sys.platform != "win32"


def _mapped(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, laid out without gaps.

    The system hands out memory that is zero, a page when it is first written, where torch would
    write them all.
    """
    assert sys.platform != "win32"
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).as_strided(shape, strides)


def zeros_like(x: Tensor) -> Tensor:
    """Zeros in the layout of x, of which few are to be written."""
    if not _is_large(x):
        return torch.zeros_like(x)
    return _mapped(x.shape, torch.empty_like(x, device="meta").stride(), x.dtype)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows (P, F) of x (N, A, F) at an index (P,) into N * A, none of which twice; zeros where it
    is N * A."""
    is_none = index == x.shape[0] * x.shape[1]
    # A row stands in for what does not exist, also where there is none at all.
    index = index.masked_fill(is_none, 0)
    if x.shape[0] * x.shape[1] == 0:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    is_dense = x.is_contiguous() or x.mT.is_contiguous()
    is_here = backend.is_cpu(x.device) and not modes.is_transformed()
    if x.requires_grad and is_dense and is_here and _is_large(x):
        found = _RowsAt.apply(x, index, is_none)
    else:
        found = _rows_at(x, index)
    return found.masked_fill(is_none.unsqueeze(1), 0)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    # Of maps, whose rows are not together, only those that are taken are copied.
    if x.is_contiguous():
        return x.flatten(0, 1).index_select(0, index)
    return x[_apart(index, x.shape)]


def _apart(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return index // shape[1], index % shape[1]


class _RowsAt(torch.autograd.Function):
    """As autograd's, but for the memory of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, is_none: Tensor) -> Tensor:
        ctx.save_for_backward(index, is_none)
        ctx.layout = list(x.shape), list(x.stride())
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        index, is_none = ctx.saved_tensors
        return _among_zeros(dout, index, is_none, *ctx.layout), None, None


@opaque(
    "(Tensor rows, Tensor index, Tensor is_none, SymInt[] shape, SymInt[] strides) -> Tensor",
    lambda rows, _, __, shape, strides: rows.new_empty_strided(shape, strides),
)
def _among_zeros(
    rows: Tensor, index: Tensor, is_none: Tensor, shape: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """Those rows that are some, among zeros of a shape, each where its index says."""
    at, rows = _apart(index[~is_none], shape), rows[~is_none]
    if modes.is_transformed(rows):  # a batch that torch hides, which nothing can be written into
        return rows.new_zeros(shape).index_put(at, rows)
    into = _mapped(shape, strides, rows.dtype)
    # To add to what was never written would be to read it first, which takes ten times longer.
    into[at] = rows
    return into
