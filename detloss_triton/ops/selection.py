"""Which rows a loss is over, where their number is known: nothing is read back. No gradients.

A graph calls these as operators: of a scan or a sort of all anchors torch 2.11's Inductor makes GPU
code that fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.engine import Sample, direct, power_of_2, strided

# Columns that a program holds at a time; what it runs through lies in the cache.
_BLOCK = 4096


def block(n_columns: int) -> dict[str, int]:
    """Columns and warps of a program that runs through so many."""
    columns = min(power_of_2(n_columns), _BLOCK)
    return {"BC": columns, "num_warps": max(columns // 256, 1)}


def _mask_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    mask = torch.rand(rows, generator=generator) > 0.6
    for n in (int(mask.sum()), int(mask.sum()) + 2, 1, 0):
        yield Sample((mask,), {"n": n})


@direct(samples=_mask_samples, opaque=True)
def first_set(mask: Tensor, n: int) -> Tensor:
    """(n,) indices of the first n entries of a mask (A,) that are set; A where there are fewer."""
    # The k-th set entry is where the running count first reaches k.
    count = mask.to(torch.int32).cumsum(0)
    rank = torch.arange(1, n + 1, device=mask.device, dtype=count.dtype)
    return torch.searchsorted(count, rank)


@first_set.triton
def _(given: Any) -> Tensor:
    found = given.mask.new_empty((given.n,), dtype=torch.int64)
    if given.n > 0:
        backend.launch(
            kernels.selection.first_set_kernel,
            (1,),
            given.mask.device,
            mask=(given.mask, given.mask.stride(0)),
            p_found=found,
            n_columns=len(given.mask),
            n=given.n,
            **block(max(len(given.mask), given.n)),
        )
    return found


def _hardness_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    hardness = torch.rand(3, rows, generator=generator)
    k = torch.tensor([[0], [min(3, rows)], [2 * rows]])
    yield Sample((hardness, k))
    yield Sample(((hardness * 4).round(), k // 2))


@direct(samples=_hardness_samples, opaque=True)
def hardest(hardness: Tensor, k: Tensor) -> Tensor:
    """(N, A) mask of the k (N, 1) largest of each row of hardness (N, A), NaN above all.

    Of equal ones the first are taken.
    """
    order = hardness.sort(dim=1, descending=True, stable=True).indices
    is_first = torch.arange(hardness.shape[1], device=hardness.device) < k
    return torch.zeros_like(is_first).scatter(1, order, is_first)


@hardest.on_cpu
def _(given: Any) -> Tensor:
    """By a threshold, the least of the k largest, in a fifth of the time of a sort.

    With a sort SSD's step would take a tenth longer.
    """
    hardness, n = given.hardness, given.hardness.shape[1]
    k = given.k.clamp(max=n)
    least = [
        row.kthvalue(n - count + 1).values if count > 0 else row.new_tensor(torch.inf)
        for row, count in zip(hardness, k.squeeze(1).tolist(), strict=True)
    ]
    if least:
        taken = (hardness >= torch.stack(least).unsqueeze(1)) & (k > 0)
        if (taken.sum(1, keepdim=True) == k).all():
            return taken
    # A NaN, or more equal ones than are taken.
    by_sorting: Tensor = hardest.reference(hardness, k)
    return by_sorting


@hardest.triton
def _(given: Any) -> Tensor:
    taken = torch.empty(given.hardness.shape, dtype=torch.bool, device=given.hardness.device)
    if taken.numel() > 0:
        backend.launch(
            kernels.selection.hardest_kernel,
            (len(taken),),
            given.hardness.device,
            x=strided(given.hardness),
            p_k=given.k.contiguous(),
            p_taken=taken,
            n_columns=taken.shape[1],
            **block(taken.shape[1]),
        )
    return taken
