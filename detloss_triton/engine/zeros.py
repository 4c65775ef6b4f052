"""Gradients that are mostly zeros, by large tensors on a CPU of which few rows count."""

from __future__ import annotations

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
    # To add to what was never written would be to read it first, which takes ten times longer.
    into[index] = rows
    return into


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows (P, F) of x (N, A, F) at an index (P,) into N * A, none of which twice; zeros where it
    is N * A."""
    if x.requires_grad and backend.is_cpu(x.device) and not modes.is_transformed():
        out: Tensor = _RowsAt.apply(x, index)
        return out
    return _rows_at(x, index)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    # A row stands in for what does not exist, also where there is none at all.
    is_none = index == x.shape[0] * x.shape[1]
    rows = x if x.shape[0] * x.shape[1] else torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    found = rows[_apart(index.masked_fill(is_none, 0), rows.shape)]
    return found.masked_fill(is_none.unsqueeze(1), 0)


def _apart(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return index // shape[1], index % shape[1]


class _RowsAt(torch.autograd.Function):
    """As autograd's, but for the memory of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.layout = list(x.shape), list(x.stride())
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _spread(dout, index, *ctx.layout), None


def _like(rows: Tensor, index: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    return rows.new_empty_strided(shape, strides)


@opaque("(Tensor rows, Tensor index, SymInt[] shape, SymInt[] strides) -> Tensor", _like)
def _spread(rows: Tensor, index: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    """The rows where an index says, among zeros, in a tensor that is laid out so."""
    exists = index < shape[0] * shape[1]
    at, rows = _apart(index[exists], shape), rows[exists]
    if modes.is_transformed(rows):  # a batch that torch hides, which nothing can be written into
        return rows.new_zeros(shape).index_put(at, rows)
    return with_rows(torch.empty_strided(shape, strides, dtype=rows.dtype, device="meta"), at, rows)
