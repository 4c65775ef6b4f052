"""Memory between guard pages: reading or writing one element beyond it ends the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Side = Literal["before", "behind"]

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def _flat(n: int, dtype: torch.dtype, side: Side) -> Tensor:
    """n poisoned elements directly behind, or directly before, a page that may not be touched."""
    page = mmap.PAGESIZE
    n_bytes = n * dtype.itemsize
    used = -(-n_bytes // page) * page
    memory = mmap.mmap(-1, used + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + used):
        result = _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE)
        assert result == 0, ctypes.get_errno()
    offset = page if side == "before" else page + used - n_bytes
    # The tensor keeps the mapping alive; what else is in its pages is poison too.
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=used, offset=page)
    whole.fill_(0xFF)
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)


def guarded(x: Tensor, side: Side, keep: bool = True) -> Tensor:
    """The tensor with its strides: on one side of its memory a guard page, poison on the other.

    Args:
        side: where the guard page is.
        keep: copy the values; else the memory is poisoned too.
    """
    if x.numel() == 0:
        return x
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    flat = _flat(span, x.dtype, side)
    placed = flat.as_strided(x.shape, x.stride())
    if keep:
        placed.copy_(x.detach())
    elif x.dtype != torch.bool:
        placed.fill_(float("nan") if x.is_floating_point() else 0x7F)
    return placed


class GuardedMemory(TorchDispatchMode):
    """Every tensor that is allocated on the CPU lies between guard pages, temporaries included."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        }
        is_empty = "empty" in function._schema.name

        def placed(x: Tensor) -> Tensor:
            if x.device.type != "cpu" or x.untyped_storage().data_ptr() in given:
                return x
            return guarded(x, self.side, keep=not is_empty)

        return tree_map_only(Tensor, placed, out)
