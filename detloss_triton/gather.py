"""Gathers whose result has a size known on the host: no `nonzero`, no boolean indexing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend
from .memory import take


def first_set(mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices (n,) of the first n set entries of a 1-d mask, and whether there are that many.

    The running count of set entries reaches k first at the k-th one; `nonzero` would ask the device
    how many there are. Where there are fewer than n, the index is 0.
    """
    count = mask.to(torch.int32).cumsum(0)
    rank = torch.arange(1, n + 1, device=mask.device, dtype=count.dtype)
    index = torch.searchsorted(count, rank)
    found = index < mask.numel()
    return torch.where(found, index, 0), found


def at_anchors(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """Features of some anchors of an image, without joining its levels.

    Shapes:
        levels: (B, *features, n_l) each, anchors last; index: (B, M) into the joined anchors.
        returns: (B, M, *features).
    """
    out: Tensor | None = None
    start = 0
    for level in levels:
        n = level.shape[-1]
        local = index - start
        inside = (local >= 0) & (local < n)
        shape = (len(index), *(1,) * (level.dim() - 2), index.shape[1])
        where = torch.where(inside, local, 0).view(shape)
        picked = take(level, -1, where.expand(*level.shape[:-1], -1))
        out = picked if out is None else torch.where(inside.view(shape), picked, out)
        start += n
    assert out is not None
    return out.movedim(-1, 1)


@torch.library.custom_op("detloss_triton::settled", mutates_args=())
def _settled(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_settled.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def settled(x: Tensor) -> Tensor:
    """x, which Inductor then computes once, and not again for each element it is broadcast to."""
    return _settled(x) if torch.compiler.is_compiling() else x


def kth_largest(x: Tensor, k: Tensor) -> Tensor:
    """(N, 1): the k-th largest of each row of x (N, A), with k (N, 1) at most A taken as 1 to A."""
    return _kth_largest(x, k.clamp(1, x.shape[1]))


@torch.library.custom_op("detloss_triton::kth_largest", mutates_args=())
def _kth_largest(x: Tensor, k: Tensor) -> Tensor:
    # A host that is the device may look how many are needed; all are a sort.
    if x.numel() == 0:
        return x.new_zeros(k.shape)
    most = int(k.numpy().max()) if backend.is_cached_by_cpu(x.device) else x.shape[1]
    return x.topk(most, dim=1).values.gather(1, k - 1)


@_kth_largest.register_fake
def _(x: Tensor, k: Tensor) -> Tensor:
    return x.new_empty(k.shape)
