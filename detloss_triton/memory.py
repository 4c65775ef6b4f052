"""Large tensors on a CPU, of which the memory costs as much as the arithmetic.

malloc gives large tensors back to the system when they are freed, and every 4 KiB of a new one are
a page fault when first written: a gradient of 40 MB costs 5 to 15 ms anew in every step. So they
are mapped here, in pages of 2 MiB where there are such, and mapped memory is used again, as on a
GPU. On other devices, and for smaller tensors, these functions are torch's own.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend
from .opaque import opaque

# Bytes from which on a tensor is mapped.
_LARGE = 2**21

# Mappings that no tensor uses; to be chosen from under the lock, as backward may run in any thread.
_free: list[mmap.mmap] = []
_choosing = threading.Lock()


def empty_like(x: Tensor) -> Tensor:
    return _mapped(x) if _is_mapped(x) else torch.empty_like(x)


def zeros_like(x: Tensor) -> Tensor:
    return empty_like(x).zero_()


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


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.gather(dim, index)`; its gradient is added to zeros, torch's to a copy of them."""
    if not backend.is_cached_by_cpu(x.device):
        return x.gather(dim, index)
    out: Tensor = _Take.apply(x, dim, index)
    return out


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        like = tensors[0].expand(len(tensors), *tensors[0].shape)
        return torch.stack(tensors, out=empty_like(like))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return dout.unbind()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return x.gather(dim, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _untake(dout, ctx.shape, ctx.dim, index), None, None


@opaque(
    "(Tensor x, SymInt[] shape, int dim, Tensor index) -> Tensor",
    lambda x, shape, dim, index: x.new_empty(shape),
)
def _untake(x: Tensor, shape: list[int], dim: int, index: Tensor) -> Tensor:
    """x added to zeros of a shape, where `take` took it."""
    zeros = zeros_like(x.new_empty(()).expand(shape))
    return zeros.scatter_add_(dim, index, x)


def _is_mapped(x: Tensor) -> bool:
    return x.numel() * x.element_size() >= _LARGE and backend.is_eager_cpu(x.device)


def _mapped(x: Tensor) -> Tensor:
    """Memory in the layout of x. It is free again when the last tensor that shares it is gone."""
    n_bytes = x.numel() * x.element_size()
    mapping = _mapping(n_bytes)
    owner = np.frombuffer(mapping, np.uint8, n_bytes)
    weakref.finalize(owner, _free.append, mapping).atexit = False
    layout = torch.empty_like(x, device="meta").stride()
    return torch.from_numpy(owner).view(x.dtype).as_strided(x.shape, layout)


def _mapping(n_bytes: int) -> mmap.mmap:
    """A free mapping of about this size. Where there is none, the others are given back."""
    with _choosing:
        for i, mapping in enumerate(_free):
            if n_bytes <= len(mapping) <= 2 * n_bytes:
                return _free.pop(i)
        _free.clear()
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes)
    # Private: a forked process has gradients of its own.
    mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel built without huge pages refuses.
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
