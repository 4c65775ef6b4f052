"""Losses over a discrete distribution per row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.launch import TILE, Tile, power_of_2
from detloss_triton.op import Input, Sample, row_loss
from detloss_triton.precision import at_least_float32
from detloss_triton.slope import with_slope

# A program holds whole rows; wider ones would spill.
MAX_BINS = 4096

# Keeps a target off the last bin, which has no right neighbour.
BIN_MARGIN = 0.01


def two_bins(distances: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(left bin, weight of the bin to its right) of distances clamped to [0, bins - 1.01]."""
    distances = at_least_float32(distances).clamp(0, bins - 1 - BIN_MARGIN)
    left = distances.floor()
    return left.long(), distances - left


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    for bins in (16, 33, 1, 81):
        logits = torch.randn(rows, bins, generator=generator) * 3
        logits[: rows // 5, 0] = 100.0
        left = torch.randint(-1, bins + 1, (rows,), generator=generator)
        right = torch.rand(rows, generator=generator)
        weight = torch.rand(rows, generator=generator).round() * 2
        yield Sample((logits, left, 1 - right, right), {}, weight)
        yield Sample((logits, left, None, None), {})


@row_loss(
    Input("logits", features=1, grad=True),
    Input("left", index=True),
    Input("weight_left", optional=True),
    Input("weight_right", optional=True),
    samples=_samples,
    skip=True,
    temporaries=2,
)
def two_bin(
    logits: Tensor, left: Tensor, weight_left: Tensor | None, weight_right: Tensor | None
) -> Tensor:
    """-(w_left log p[left] + w_right log p[left + 1]), p = softmax(logits).

    Defaults w_left = 1, w_right = 0 make it the softmax cross-entropy. A row whose left bin does
    not exist costs 0; so does a right bin beyond the last.
    """
    left = left.long()
    bins = [left]
    if weight_right is not None:
        bins.append(torch.where(left >= 0, left + 1, -1))
    loss, *right = _surprisals(logits, bins)
    if weight_left is not None:
        loss = loss * weight_left
    return loss + right[0] * weight_right if weight_right is not None else loss


def _surprisals(logits: Tensor, bins: list[Tensor]) -> list[Tensor]:
    """-log softmax(logits) at one bin per row, for each of some; 0 where it does not exist."""
    if not torch.compiler.is_compiling():
        log_p = logits.log_softmax(-1).reshape(-1, logits.shape[-1])
        return [_at(log_p, index.reshape(-1)).view_as(index) for index in bins]
    # Inductor so reads the logits twice, for the largest and for the sum; the picked entries are
    # found on the way.
    x = logits - logits.detach().amax(-1, keepdim=True)
    norm = x.exp().sum(-1).log()
    bins = [_or_none(i, logits.shape[-1]) for i in bins]
    if len(bins) > 1:
        # Each comparison would be a pass over all bins.
        at = [x.gather(-1, i.clamp(min=0).unsqueeze(-1)).squeeze(-1) for i in bins]
    else:
        # A gather's gradient is a loop of its own.
        columns = torch.arange(x.shape[-1], device=x.device)
        at = [torch.where(columns == i.unsqueeze(-1), x, 0).sum(-1) for i in bins]
    return [torch.where(i >= 0, norm - found, 0) for i, found in zip(bins, at, strict=True)]


def _at(log_p: Tensor, index: Tensor) -> Tensor:
    """-log_p (n, bins) at an index per row, 0 where there is no such bin."""
    # A thread picks from the rows it wrote. A gather picks from those of another thread too, and
    # then the cores wait for each other's caches, here for longer than log_softmax takes.
    pick = partial(F.nll_loss, log_p, ignore_index=-1, reduction="none")
    if backend.is_eager_cpu(index.device):
        # Nearly always all exist, and there it looks at each of them itself.
        with suppress(IndexError):
            return pick(target=index)
    return pick(target=_or_none(index, log_p.shape[-1]))


def _or_none(index: Tensor, bins: int) -> Tensor:
    """The index of a bin, -1 where there is no such bin."""
    return torch.where((index >= 0) & (index < bins), index, -1)


@two_bin.triton
def _(logits: Tensor, left: Any, weight_left: Any, weight_right: Any) -> Tile:
    return _whole_rows(kernels.distributions.two_bin_kernel, logits)


@two_bin.limited
def _beyond(logits: Tensor, *others: Tensor | None) -> str:
    bins = logits.shape[-1]
    return f"logits may have up to {MAX_BINS} bins, got {bins}," if bins > MAX_BINS else ""


def _whole_rows(kernel: Any, logits: Tensor, tile: int = TILE, **constants: Any) -> Tile:
    bins = power_of_2(logits.shape[-1])
    # Rows wider than a tile take more warps, not more registers.
    warps = max(4, bins * 4 // TILE)
    constants |= {"BK": bins, "num_warps": warps}
    return Tile(kernel, rows=max(tile // bins, 1), constants=constants)


def _distillation_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    for bins in (33, 17, 1):
        student = torch.randn(rows, bins, generator=generator) * 3
        teacher = torch.randn(rows, bins, generator=generator) * 3
        teacher[: rows // 5, 0] = 100.0
        weight = torch.rand(rows, generator=generator)
        yield Sample((student, teacher), {"temperature": 5.0}, weight)


@row_loss(
    Input("student", features=1, grad=True),
    Input("teacher", features=1),
    samples=_distillation_samples,
    skip=True,
    temporaries=8,
)
def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Its gradient is T (q - p) by definition: so a student that equals its teacher has one of exactly
    0, and not the rounding error of sum p = 1.
    """
    with torch.no_grad():
        x, q, log_x = _softmax(student, temperature)
        t, p, log_t = _softmax(teacher, temperature)
        bits = (p * (t - x)).sum(-1) + (log_x - log_t)
        losses = temperature**2 * math.log(2) * bits
        slope = temperature * (q - p)
    return with_slope(losses, slope, student)


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms up to a constant of their row, softmax, and the constant; to the base of 2.

    To that base as torch's exp on a CPU is MKL's, which on some takes three times as long as exp2.
    """
    x = logits * (math.log2(math.e) / temperature)
    x = x - x.amax(-1, keepdim=True)
    e = x.exp2()
    total = e.sum(-1, keepdim=True)
    return x, e / total, total.log2().squeeze(-1)


distillation.limited(_beyond)


@distillation.triton
def _(student: Tensor, teacher: Tensor, temperature: float) -> Tile:
    # Half a tile of two tensors each: with whole ones 8 bytes are spilled on sm_80.
    return _whole_rows(
        kernels.distributions.distillation_kernel,
        student,
        TILE // 2,
        TEMPERATURE=float(temperature),
    )
