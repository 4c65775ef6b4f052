"""Large tensors on a CPU, of which the memory costs as much as the arithmetic.

malloc gives large tensors back to the system when they are freed, and every 4 KiB of a new one are
a page fault when first written: a gradient of 40 MB costs 5 to 15 ms anew in every step. So they
are mapped here, in pages of 2 MiB where there are such, and mapped memory is used again, as on a
GPU. On other devices, and for smaller tensors, these functions are torch's own.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backend
from .opaque import opaque

# Bytes from which on a tensor is mapped, and beyond which its memory is not to be kept.
_LARGE, _HUGE = 2**22, 2**28

# Up to so many threads of torch's write zeros slower than one of libc's, which does not read first
# what it overwrites: here two took more than twice as long.
_FEW_THREADS = 4

# A mapping that was not chosen while so many were chosen or freed is given back: it is of another
# size than the last few steps had.
_KEPT = 64

# Mappings that no tensor uses, each with the tick of its release; to be chosen from under the lock,
# as backward may run in any thread.
_free: list[tuple[int, mmap.mmap]] = []
_choosing = threading.Lock()
_ticks = itertools.count()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`."""
    dtype = dtype or like.dtype
    n_bytes = math.prod(shape) * dtype.itemsize
    if not _pays(n_bytes, like):
        return like.new_empty(shape, dtype=dtype)
    return _mapped(n_bytes).view(dtype).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`, in the layout of x."""
    n_bytes = x.numel() * x.element_size()
    if not _pays(n_bytes, x):
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    return _mapped(n_bytes).view(x.dtype).as_strided(x.shape, strides)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """`like.new_zeros(shape)`."""
    return _zeroed(empty(shape, like))


def zeros_like(x: Tensor) -> Tensor:
    """`torch.zeros_like(x)`, in the layout of x."""
    return _zeroed(empty_like(x))


def wanted_like(
    allocate: Callable[[Tensor], Tensor], tensors: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """`allocate(x)` of each tensor that is there and wanted: gradients, before they are written."""
    return [
        allocate(x) if want and x is not None else None
        for x, want in zip(tensors, wanted, strict=True)
    ]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` along a new first dimension."""
    first, *others = tensors
    if not backend.is_eager_cpu(first.device) or any(x.dtype != first.dtype for x in others):
        return torch.stack(list(tensors))
    out: Tensor = _Stack.apply(*tensors)
    return out


def cat(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """`torch.cat([torch.cat(row, -1) for row in rows])`, without inner copies and a gradient."""
    pieces = [[x.detach() for x in row] for row in rows]
    first = pieces[0][0]
    mixed = any(x.dtype != first.dtype for row in pieces for x in row)
    if mixed or not backend.is_eager_cpu(first.device):
        return torch.cat([torch.cat(row, -1) for row in pieces])
    depths = [len(row[0]) for row in pieces]
    out = empty((sum(depths), *first.shape[1:-1], sum(x.shape[-1] for x in pieces[0])), first)
    for row, part in zip(pieces, out.split(depths), strict=True):
        torch.cat(row, -1, out=part)
    return out


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.gather(dim, index)`, or `x.index_select(dim, index)` with an index of one dimension.

    Its gradient is added to zeros; torch's to a copy of them, which is one pass more.
    """
    if not backend.is_cached_by_cpu(x.device) or backend.is_transformed():
        return _taken(x, dim, index)
    if dim == 0 and index.dim() == 1 and _is_small(x):
        # A Function in Python would cost more than it saves.
        return x[index]
    out: Tensor = _Take.apply(x, dim, index)
    return out


def forked(x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """x and `x[start:stop]`, of which the gradients are added without a padded copy of one."""
    if not backend.is_eager_cpu(x.device):
        return x, x[start:stop]
    both: tuple[Tensor, Tensor] = _Forked.apply(x, start, stop)
    return both


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        first = tensors[0]
        return torch.stack(tensors, out=empty((len(tensors), *first.shape), first))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return dout.unbind()


class _Forked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        ctx.bounds = start, stop
        return x.view_as(x), x[start:stop]

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dsome: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.bounds
        if torch.is_grad_enabled() or backend.is_transformed(dx):
            return dx.index_add(0, torch.arange(start, stop, device=dx.device), dsome), None, None
        out = empty_like(dx)
        out[:start], out[stop:] = dx[:start], dx[stop:]
        torch.add(dx[start:stop], dsome, out=out[start:stop])
        return out, None, None


def _taken(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x.index_select(dim, index) if index.dim() == 1 else x.gather(dim, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return _taken(x, dim, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        if backend.is_transformed(dout):
            out = dout.new_zeros(ctx.shape)
            add = torch.index_add if index.dim() == 1 else torch.scatter_add
            return add(out, ctx.dim, index, dout), None, None
        return _untake(dout, ctx.shape, ctx.dim, index), None, None


@opaque(
    "(Tensor x, SymInt[] shape, int dim, Tensor index) -> Tensor",
    lambda x, shape, dim, index: x.new_empty(shape),
)
def _untake(x: Tensor, shape: list[int], dim: int, index: Tensor) -> Tensor:
    """x added to zeros of a shape, where `take` took it."""
    out = zeros(shape, x)
    if index.dim() > 1:
        return out.scatter_add_(dim, index, x)
    order = index.numpy()
    if (order[1:] > order[:-1]).all():
        # Each was taken once, and adding would go slice by slice.
        return out.index_copy_(dim, index, x)
    return out.index_add_(dim, index, x)


def _zeroed(x: Tensor) -> Tensor:
    n_bytes = x.numel() * x.element_size()
    if not _pays(n_bytes, x) or torch.get_num_threads() > _FEW_THREADS:
        return x.zero_()
    ctypes.memset(x.data_ptr(), 0, n_bytes)
    return x


def _is_small(x: Tensor) -> bool:
    """Whether this is an eager CPU, and x not large."""
    return backend.is_eager_cpu(x.device) and x.numel() * x.element_size() < _LARGE


def _pays(n_bytes: int, like: Tensor) -> bool:
    if not _LARGE <= n_bytes <= _HUGE or backend.is_transformed(like):
        return False
    return backend.is_eager_cpu(like.device)


def _mapped(n_bytes: int) -> Tensor:
    """So many bytes. They are free again when the last tensor that shares them is gone."""
    mapping = _mapping(n_bytes)
    owner = np.frombuffer(mapping, np.uint8, n_bytes)
    weakref.finalize(owner, _release, mapping).atexit = False
    return torch.from_numpy(owner)


def _release(mapping: mmap.mmap) -> None:
    # Without the lock: a garbage collection may run this in the thread that holds it.
    _free.append((next(_ticks), mapping))


def _mapping(n_bytes: int) -> mmap.mmap:
    """The smallest free mapping that is not much too large, or a new one."""
    with _choosing:
        now = next(_ticks)
        fitting = [i for i, (_, m) in enumerate(_free) if n_bytes <= len(m) <= 2 * n_bytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: len(_free[i][1])))[1]
        _free[:] = [(freed, m) for freed, m in _free if now - freed < _KEPT]
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes)
    # Private: a forked process has gradients of its own.
    mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel built without huge pages refuses.
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
