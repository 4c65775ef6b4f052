"""Which entries of tensors count, where a CPU can see it: masks, weights, and flat indices.

A look costs no synchronisation where the host is the device. Masks are looked at by numpy or after
a cast, and values by their extremes: torch's comparisons and reductions of masks take several times
as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from . import backend
from .precision import at_least_float32


@dataclass(frozen=True)
class At:
    """Some entries of tensors that have the leading dimensions `shape`: their flat indices."""

    flat: Tensor
    shape: torch.Size

    @cached_property
    def by_dimension(self) -> tuple[Tensor, ...]:
        # Several dimensions at once take numpy's nonzero ten times as long.
        found = np.unravel_index(self.flat.numpy(), tuple(self.shape))
        return tuple(torch.from_numpy(index) for index in found)

    def of(self, x: Tensor) -> Tensor:
        if x.is_contiguous():  # A third of the time.
            return x.flatten(0, len(self.shape) - 1).index_select(0, self.flat)
        return x[self.by_dimension]

    def put(self, x: Tensor, values: Tensor) -> None:
        values = values.view(len(self.flat), *x.shape[len(self.shape) :])
        if x.is_contiguous():
            x.flatten(0, len(self.shape) - 1).index_copy_(0, self.flat, values)
        else:
            x[self.by_dimension] = values

    def rows(self, n: int) -> At:
        """The row of each entry, in the first n dimensions."""
        if n == len(self.shape):
            return self
        return At(self.flat // self.shape[n:].numel(), self.shape[:n])


def where(mask: Tensor) -> At:
    """A CPU mask's set entries."""
    return At(torch.from_numpy(np.flatnonzero(mask.numpy())), mask.shape)


def factor(x: Tensor | None) -> Tensor | None:
    """A mask or weights; None where a CPU sees that they are 1 everywhere, as most are."""
    if x is None or x.numel() == 0 or not backend.is_eager_cpu(x.device):
        return x
    # Most that differ somewhere do so in their first row.
    first = at_least_float32(x[(0,) * (x.dim() - 1)].detach()).numpy()
    return None if (first == 1).all() and _is_one(x) else x


def none_negative(x: Tensor) -> bool:
    """Whether a CPU sees that all are 0 or more, and none is NaN."""
    if not backend.is_eager_cpu(x.device):
        return False
    return x.numel() == 0 or bool(x.detach().amin().double().numpy() >= 0)


def without_skipped(losses: Tensor, weight: Tensor) -> Tensor:
    """Weighted losses of an eager CPU, of exactly 0 where the weight is 0: 0 times NaN is NaN."""
    # A look at the sum costs less than a `where`, and nearly always it is finite.
    if np.isfinite(losses.detach().sum().numpy()):
        return losses
    return torch.where(weight.bool(), losses, 0)


def _is_one(x: Tensor) -> bool:
    # torch's reductions of a large mask take many times as long.
    if x.dtype == torch.bool:
        return bool(x.numpy().all())
    extremes = torch.stack(x.detach().aminmax())
    return bool((extremes.double().numpy() == 1).all())
