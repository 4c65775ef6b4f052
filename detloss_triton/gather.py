"""Gathers whose result has a size known on the host: no `nonzero`, no boolean indexing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import backend
from .memory import take
from .opaque import opaque


def count_of(mask: Tensor) -> int | None:
    """How many entries of a mask are set, where a CPU may look."""
    return int(np.count_nonzero(mask.numpy())) if backend.is_eager_cpu(mask.device) else None


def first_set(mask: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """Indices (n,) of the first n set entries of a 1-d mask, and whether there are that many.

    Where there are fewer than n, the index is 0; a CPU that sees there are enough says None.
    """
    index = _first_set(mask, n)
    if backend.is_eager_cpu(mask.device) and (n == 0 or index.numpy()[-1] < mask.numel()):
        return index, None
    found = index < mask.numel()
    return torch.where(found, index, 0), found


@opaque(
    "(Tensor mask, SymInt n) -> Tensor", lambda mask, n: mask.new_empty((n,), dtype=torch.int64)
)
def _first_set(mask: Tensor, n: int) -> Tensor:
    """Indices (n,) of the first n set entries, and the length of the mask for those beyond."""
    if backend.is_cached_by_cpu(mask.device):
        found = torch.from_numpy(np.flatnonzero(mask.numpy())[:n])
        if len(found) == n:
            return found
        return torch.nn.functional.pad(found, (0, n - len(found)), value=mask.numel())
    # The running count of set entries reaches k first at the k-th one; `nonzero` would ask the
    # device how many there are.
    count = mask.to(torch.int32).cumsum(0)
    rank = torch.arange(1, n + 1, device=mask.device, dtype=count.dtype)
    return torch.searchsorted(count, rank)


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


@opaque("(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def settled(x: Tensor) -> Tensor:
    """x, which Inductor then computes once, and not again for each element it is broadcast to."""
    return _copied(x) if torch.compiler.is_compiling() else x


@opaque("(Tensor x, Tensor k) -> Tensor", lambda x, k: x.new_empty(x.shape, dtype=torch.bool))
def hardest(x: Tensor, k: Tensor) -> Tensor:
    """(N, A) mask of the k largest of each row of x (N, A), for k (N, 1) from 0 on.

    How many they are is known on the device only: they are those above a threshold, and of those at
    it the first. NaN is above all and always taken, and where the k-th is NaN, so is the row.
    """
    # Opaque as a whole: of a cumsum over (16, 8732) anchors Inductor of torch 2.11 makes code for a
    # GPU that does not run, and as torch's own it costs no more there than in an eager step.
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    threshold = _kth_largest(x, k.clamp(1, x.shape[1]))
    taken = ~(x < threshold)
    if backend.is_eager_cpu(x.device) and (taken.sum(1, keepdim=True) == k).numpy().all():
        return taken
    above = ~(x <= threshold)
    at = taken & ~above
    left = k - above.sum(1, keepdim=True)
    return (above | (at & (at.cumsum(1) <= left))) & (k > 0)


def _kth_largest(x: Tensor, k: Tensor) -> Tensor:
    # A host that is the device may look how many are needed; all are a sort.
    most = int(k.numpy().max()) if backend.is_cached_by_cpu(x.device) else x.shape[1]
    return x.topk(most, dim=1).values.gather(1, k - 1)
