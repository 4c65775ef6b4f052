"""Launching a fused op: one kernel a pass over all its tensors, and one that adds and divides.

A program of the forward pass writes a partial sum of each term; `kernels/totals.py` makes losses of
them. Backward reads the upstream gradient and the divisors from the device and writes every
gradient, zeros included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.ranks import are_several, mean_over_ranks

from .formula import FusedCall
from .gpu import power_of_2

# Partial sums that a program adds at a time.
_BLOCK = 4096

# What a loss is divided by, as in `kernels/totals.py`.
NOTHING, DIVISOR, SUM, OWN_SUM, SECOND, OWN_SUM_OR_1 = range(6)

Gradients = list[Tensor | None]
Tensors = tuple[Tensor, ...]


def new_gradients(tensors: Tensors, wanted: Sequence[bool]) -> Gradients:
    """Memory for the gradients wanted, in the layouts of the tensors."""
    pairs = zip(tensors, wanted, strict=True)
    return [torch.empty_like(x) if want else None for x, want in pairs]


class Passes(Protocol):
    """What a fused op's launcher answers."""

    def n_losses(self) -> int: ...

    def n_found(self) -> int:
        """How many numbers forward leaves to backward."""

    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The losses, and what backward wants to know of forward."""

    def backward(
        self,
        call: FusedCall,
        tensors: Tensors,
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> Gradients: ...


@dataclass
class Plan:
    """Losses of segments (levels, layers or images), each a weighted sum over its programs.

    Args:
        kernel: takes `levels`, of each a tuple of the op's inputs and of the gradients wanted; the
            partial sums `p_out` of forward; `p_dout` and `p_scale` of backward.
        terms: (factor, kind of divisor, addend of the divisor or row of its sum) of each loss. A
            SUM is over all ranks, and their mean.
        n_sums: how many sums a program writes: the losses' first.
        blocks: programs of each segment, or one number if all have as many, `n_repeats` times.
        divisor: what DIVISOR stands for, a number or a tensor of one; of two, SECOND is the other.
        arguments: the kernel's own.
    """

    kernel: Any
    terms: tuple[tuple[float, int, float], ...]
    n_sums: int
    blocks: tuple[int, ...]
    n_repeats: int
    n_segments: int
    divisor: float | Tensor = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def n_losses(self) -> int:
        return len(self.terms) * self.n_segments

    def n_found(self) -> int:
        return self.n_losses()

    @property
    def n_programs(self) -> int:
        each = self.blocks * (self.n_segments if len(self.blocks) == 1 else 1)
        return sum(each) * self.n_repeats

    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        device = tensors[0].device
        sums = torch.empty((self.n_sums, self.n_programs), dtype=torch.float32, device=device)
        if self.n_programs:
            self._launch(call, tensors, [None] * len(tensors), p_out=sums)
        if not (are_several() and any(kind == SUM for _, kind, _ in self.terms)):
            return self._totals(sums, self.blocks, self.n_repeats, self.terms)
        sums, _ = self._totals(sums, self.blocks, self.n_repeats, ())
        sums = sums.view(self.n_sums, self.n_segments)
        n = len(self.terms)
        sums[n:] = mean_over_ranks(sums[n:].clone())
        return self._totals(sums, (1,), 1, self.terms)

    def backward(
        self,
        call: FusedCall,
        tensors: Tensors,
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> Gradients:
        into = new_gradients(tensors, wanted)
        if self.n_programs:
            dout = dout.to(torch.float32).contiguous()
            self._launch(call, tensors, into, p_dout=dout, **self._known(found))
        return into

    def _known(self, found: Tensor) -> dict[str, Tensor]:
        """What backward's kernel takes of what forward found."""
        return {"p_scale": found}

    def _launch(
        self, call: FusedCall, tensors: Tensors, gradients: Gradients, **pointers: Tensor
    ) -> None:
        backend.launch(
            self.kernel,
            (self.n_programs,),
            tensors[0].device,
            levels=call.levels(tensors, gradients),
            **{"p_out": None, "p_dout": None, "p_scale": None, **pointers},
            **self.arguments,
        )

    def _totals(
        self,
        sums: Tensor,
        blocks: tuple[int, ...],
        n_repeats: int,
        terms: tuple[Any, ...],
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(losses, their factors, in memory that may be given); without terms all sums."""
        n_out = (len(terms) or self.n_sums) * self.n_segments
        out = sums.new_empty(n_out)
        scale = sums.new_empty(n_out) if scale is None else scale
        by_tensor = isinstance(self.divisor, Tensor)
        backend.launch(
            kernels.totals.totals_kernel,
            (n_out,),
            sums.device,
            p_sums=sums,
            p_divisor=self.divisor if by_tensor else None,
            p_out=out,
            p_scale=scale,
            blocks=blocks,
            divisor=1.0 if by_tensor else float(self.divisor),
            n_repeats=n_repeats,
            n_segments=self.n_segments,
            n_programs=sums.shape[1],
            TERMS=terms,
            N_TERMS=len(terms),
            N_BLOCKS=len(blocks),
            BLOCK=min(power_of_2(sums.shape[1]), _BLOCK),
            num_warps=4,
        )
        return out, scale


class Sum:
    """The sum of numbers, each where it lies: no one else needs their gradients in memory."""

    def n_losses(self) -> int:
        return 1

    def n_found(self) -> int:
        return 0

    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        out = torch.empty(1, dtype=torch.float32, device=tensors[0].device)
        backend.launch(
            kernels.totals.sum_kernel,
            (1,),
            out.device,
            terms=tensors,
            p_out=out,
            N=len(tensors),
            num_warps=1,
        )
        return out, out.new_empty(0)

    def backward(
        self,
        call: FusedCall,
        tensors: Tensors,
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> Gradients:
        one = dout.view(())
        made: dict[Any, Tensor] = {(one.dtype, one.shape): one}
        for x in tensors:
            if (x.dtype, x.shape) not in made:
                made[x.dtype, x.shape] = one.to(x.dtype).expand(x.shape)
        pairs = zip(tensors, wanted, strict=True)
        return [made[x.dtype, x.shape] if want else None for x, want in pairs]


def forward(
    call: FusedCall, weight: None, tensors: Tensors, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    passes: Passes = call.passes(tensors)
    return passes.forward(call, tensors)


def backward(
    call: FusedCall,
    weight: None,
    tensors: Tensors,
    dout: Tensor,
    wanted: Sequence[bool],
    found: Tensor,
) -> Gradients:
    passes: Passes = call.passes(tensors)
    return passes.backward(call, tensors, dout, wanted, found)
