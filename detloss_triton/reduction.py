"""How the losses of a batch become one number, how that is normalised, and handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import is_cpu
from .engine import RowOp
from .precision import arithmetic_dtype
from .ranks import are_several, mean_over_ranks

REDUCTIONS = ("none", "mean", "sum")

# Keeps `sum / avg_factor` finite; the spacing of float32 at 1, so that it rounds away otherwise.
EPS32 = 2.0**-23


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def reduced(
    op: RowOp,
    *inputs: Tensor | None,
    reduction: str,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    avg_eps: float = EPS32,
    count: int | None = None,
    scale: float = 1.0,
    **params: Any,
) -> Tensor:
    """`scale` times the op's weighted losses: each, their mean or sum, or sum / avg_factor.

    A mean is over the losses, weighted or not: the rows, unless `count` says how many there are.

    Raises:
        TypeError: for an avg_factor that is neither number nor tensor.
        ValueError: for an unknown reduction, an avg_factor of several numbers, or one with "sum".
    """
    check_reduction(reduction)
    first = inputs[0]
    assert first is not None
    rows = first.shape[:-1]
    dtype = arithmetic_dtype(*inputs)
    if avg_factor is not None:
        avg_factor = as_divisor("avg_factor", avg_factor, dtype)
    if reduction == "none":
        return scaled(op(*inputs, weight=weight, keep=len(rows), **params), scale)
    if avg_factor is None:
        count = rows.numel() if count is None else count
        divisor: float | Tensor = max(count, 1) if reduction == "mean" else 1
    elif reduction == "sum":
        raise ValueError("avg_factor cannot be used with reduction='sum'")
    else:
        divisor = avg_factor + avg_eps
    total = op(*inputs, weight=weight, **params)
    if isinstance(divisor, Tensor) or divisor == 0:
        return scaled(total, scale) / divisor
    return scaled(total, scale / divisor)


def as_divisor(
    place: str, given: Any, dtype: torch.dtype, device: torch.device | None = None
) -> float | Tensor:
    """What losses of a dtype are divided by: a number, or a tensor of one, then 0-dim, detached and
    as exact as they are.

    Raises:
        TypeError: for what is no number, a flag included; it begins with `place`.
        ValueError: for a tensor of several numbers, or on another device; the host's is right
            beside any.
    """
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, (int, float, np.number)):
            raise TypeError(f"{place} must be a number, got {type(given).__name__}")
        return float(given) if isinstance(given, np.number) else given
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"{place} must be a number, got a tensor of {given.dtype}")
    if given.numel() != 1:
        raise ValueError(f"{place} must be one number, got shape {tuple(given.shape)}")
    if device not in (None, given.device) and not is_cpu(given.device):
        raise ValueError(f"{place} must be on {device}, got {given.device}")
    given = given.detach().reshape(())
    # An integer is divided by as it is: one launch less.
    if dtype != torch.float64 and not given.is_floating_point():
        return given
    return given.to(dtype)


def scaled(loss: Tensor, scale: float) -> Tensor:
    return loss if scale == 1.0 else loss * scale


def rank_means(*sums: Tensor) -> list[Tensor]:
    """The mean over ranks of each 0-dim tensor, in one collective; on one process as it is.

    In float64 where one of them is, else in float32.
    """
    dtype = arithmetic_dtype(*sums)
    ours = [s.detach().to(dtype) for s in sums]
    if not are_several():
        return ours
    return list(mean_over_ranks(torch.stack(ours)).unbind())
