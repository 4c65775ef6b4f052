"""Gradients that are mostly zeros, by large tensors on a CPU of which few rows count."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend

from . import modes
from .operators import opaque

# Bytes from which on it pays.
_LARGE = 2**22


def zeros_like(x: Tensor) -> Tensor:
    """Zeros in the layout of x, which is on a CPU or, to tell a layout alone, on no device.

    The system hands out memory that is zero, a page when it is first written, where torch would
    write them all.
    """
    size = x.numel() * x.element_size()
    if size < _LARGE or sys.platform == "win32":
        return torch.zeros_like(x, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    strides = torch.empty_like(x, device="meta").stride()
    return torch.frombuffer(pages, dtype=x.dtype).as_strided(x.shape, strides)


def with_rows(x: Tensor, index: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Zeros in the layout of x, but for the rows at an index."""
    into = zeros_like(x)
    into[index] = rows
    return into


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows (P, F) of x (R, F) at an index (P,), none of which twice; zeros where it is R."""
    if x.requires_grad and backend.is_cpu(x.device) and not modes.is_transformed():
        out: Tensor = _RowsAt.apply(x, index)
        return out
    return _rows_at(x, index)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    is_none = index == len(x)
    # A row stands in for what does not exist, also where there is none at all.
    rows = x if len(x) else torch.nn.functional.pad(x, (0, 0, 0, 1))
    found = rows.index_select(0, index.masked_fill(is_none, 0))
    return found.masked_fill(is_none.unsqueeze(1), 0)


class _RowsAt(torch.autograd.Function):
    """As autograd's, but for the memory of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = len(x)
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        spread = _spread_batches if modes.is_transformed(dout) else _spread
        return spread(dout, index, ctx.n), None


@opaque(
    "(Tensor x, Tensor index, SymInt n) -> Tensor", lambda x, _, n: x.new_empty((n, x.shape[1]))
)
def _spread(x: Tensor, index: Tensor, n: int) -> Tensor:
    """The rows of x where an index in [0, n) says, among n of zeros."""
    exists = index < n
    into = zeros_like(x.new_empty((n, x.shape[1]), device="meta"))
    # To add to what was never written would be to read it first, which takes ten times longer.
    return into.index_copy_(0, index[exists], x[exists])


def _spread_batches(x: Tensor, index: Tensor, n: int) -> Tensor:
    """The same of a batch that torch hides, which nothing can be written into."""
    exists = index < n
    return x.new_zeros((n, x.shape[1])).index_copy(0, index[exists], x[exists])
