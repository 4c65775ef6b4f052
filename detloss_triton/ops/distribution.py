"""Losses over a discrete distribution per row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.engine import Input, Sample, Tile, power_of_2, row_loss
from detloss_triton.precision import at_least_float32

# A program holds whole rows; wider ones would spill.
MAX_BINS = 4096
# Entries that a warp takes, at least and at most: 8 and 16 in each lane.
_SHORT, _LONG = 256, 512
# Keeps a target off the last bin, which has no right neighbour.
BIN_MARGIN = 0.01


def two_bins(distances: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(left bin, weight of the bin to its right) of distances, clamped into the bins."""
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
    log_p, left = _log_softmax(logits), left.long()
    loss = _surprisal(log_p, left)
    if weight_left is not None:
        loss = loss * weight_left
    if weight_right is None:
        return loss
    right = (left + 1).masked_fill(left < 0, -1)
    return loss + _surprisal(log_p, right) * weight_right


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension. Torch would copy a map, whose bins lie apart, to lie together."""
    if logits.dim() > 1 and logits.stride(-1) > logits.stride(-2):
        return logits.mT.log_softmax(-2).mT
    return logits.log_softmax(-1)


def _surprisal(log_p: Tensor, index: Tensor) -> Tensor:
    """-log_p at one bin of each row; 0 where it does not exist."""
    exists = (index >= 0) & (index < log_p.shape[-1])
    at = index.masked_fill(~exists, 0).unsqueeze(-1)
    return (-log_p.gather(-1, at).squeeze(-1)).masked_fill(~exists, 0)


@two_bin.triton
def _(given: Any) -> Tile:
    return _whole_rows(kernels.distributions.two_bin_kernel, given.logits)


@two_bin.limited
def _beyond(logits: Tensor, *others: Tensor | None) -> str:
    bins = logits.shape[-1]
    return f"logits may have up to {MAX_BINS} bins, got {bins}" if bins > MAX_BINS else ""


def _whole_rows(kernel: Any, logits: Tensor, **constants: Any) -> Tile:
    bins = logits.shape[-1]
    rows, warps = rows_and_warps(bins)
    return Tile(kernel, rows, constants | {"BK": power_of_2(bins), "num_warps": warps})


def rows_and_warps(n_bins: int) -> tuple[int, int]:
    """What a program takes: a warp with 4 rows of 33 or 81 bins, on an H100 twice as fast as a
    tile's rows and 4 warps; more rows if they are short, more warps if they are long."""
    bins = power_of_2(n_bins)
    return max(_SHORT // bins, min(4, _LONG // bins), 1), max(bins // _LONG, 1)


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

    Written so that the gradient T (q - p) subtracts two softmaxes that are computed alike: it is
    exactly 0 where the student equals its teacher.
    """
    x, t = student / temperature, teacher / temperature
    x, t = x - x.detach().amax(-1, keepdim=True), t - t.amax(-1, keepdim=True)
    norm_x, norm_t = x.logsumexp(-1), t.logsumexp(-1)
    p = (t - norm_t.unsqueeze(-1)).exp()
    return temperature**2 * ((p * (t - x)).sum(-1) + norm_x - norm_t)


distillation.limited(_beyond)


@distillation.triton
def _(given: Any) -> Tile:
    kernel = kernels.distributions.distillation_kernel
    return _whole_rows(kernel, given.student, TEMPERATURE=float(given.temperature))
