"""Launching a fused op: one kernel a pass over all its tensors, and one that adds and divides.

A program of the forward pass writes a partial sum of each term; `kernels/totals.py` makes losses of
them. Backward reads the upstream gradient and the divisors from the device and writes every
gradient, zeros included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.ranks import are_several, mean_over_ranks

from .calls import FusedCall, filled, has_slot, slotted
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


def upstream(dout: Tensor) -> tuple[Tensor, int]:
    """Upstream gradients as kernels take them: with their stride, 0 where all are one number."""
    dout = dout.to(torch.float32)
    return dout, dout.stride(0)


class Passes(ABC):
    """What a fused op's launcher answers: both passes of all calls of a signature.

    Attributes:
        arguments: the kernel's own, with slots in the place of tensors once these are set.
        divisor: of the losses, if it is a tensor; a number is the call's.
    """

    arguments: dict[str, Any]
    divisor: Any

    @abstractmethod
    def n_losses(self) -> int: ...

    @abstractmethod
    def n_found(self) -> int:
        """How many numbers forward leaves to backward."""

    @abstractmethod
    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The losses, and what backward wants to know of forward."""

    @abstractmethod
    def backward(
        self,
        call: FusedCall,
        tensors: Tensors,
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> Gradients:
        """The gradients wanted."""

    def set_slots(self, places: Mapping[int, int]) -> None:
        """Let go of the tensors, whose places in a call are told by their ids."""
        self.arguments = {name: slotted(x, places) for name, x in self.arguments.items()}
        self.with_slots = [name for name, x in self.arguments.items() if has_slot(x)]
        self.divisor = slotted(self.divisor, places)

    def filled(self, tensors: Tensors) -> dict[str, Any]:
        """The arguments with a call's tensors."""
        arguments = self.arguments.copy()
        for name in self.with_slots:
            arguments[name] = filled(arguments[name], tensors)
        return arguments

    def divided(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor | None, float]:
        """The divisor as a tensor, or none, and as a number."""
        return filled(self.divisor, tensors), 1.0 if call.number is None else float(call.number)


@dataclass
class Plan(Passes):
    """Losses of segments (levels, layers or images), each a weighted sum over its programs.

    Args:
        kernel: takes `levels`, of each a tuple of the op's inputs and of the gradients wanted; the
            partial sums `p_out` of forward; `dout` and `p_scale` of backward.
        terms: (factor, kind of divisor, addend of the divisor or row of its sum) of each loss. A
            SUM is over all ranks, and their mean.
        n_sums: how many sums a program writes: the losses' first.
        blocks: programs of each segment, or one number if all have as many, `n_repeats` times.
        divisor: what DIVISOR stands for, a tensor of one, or none for the call's number; of two,
            SECOND is the other.
        arguments: the kernel's own.
    """

    kernel: Any
    terms: tuple[tuple[float, int, float], ...]
    n_sums: int
    blocks: tuple[int, ...]
    n_repeats: int
    n_segments: int
    divisor: Any = None
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
            return self._totals(call, tensors, sums)
        sums, _ = self._totals(call, tensors, sums, terms=())
        sums = sums.view(self.n_sums, self.n_segments)
        n = len(self.terms)
        sums[n:] = mean_over_ranks(sums[n:].clone())
        return self._totals(call, tensors, sums, are_added=True)

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
            self._launch(call, tensors, into, dout=upstream(dout), **self._known(found))
        return into

    def _known(self, found: Tensor) -> dict[str, Tensor]:
        """What backward's kernel takes of what forward found."""
        return {"p_scale": found}

    def _launch(
        self, call: FusedCall, tensors: Tensors, gradients: Gradients, **pointers: Any
    ) -> None:
        backend.launch(
            self.kernel,
            (self.n_programs,),
            tensors[0].device,
            levels=call.signature.levels(tensors, gradients),
            **{"p_out": None, "dout": None, "p_scale": None, **pointers},
            **self.filled(tensors),
        )

    def _totals(
        self,
        call: FusedCall,
        tensors: Tensors,
        sums: Tensor,
        terms: tuple[Any, ...] | None = None,
        scale: Tensor | None = None,
        are_added: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(losses, their factors, in memory that may be given); with terms () all sums. Programs'
        sums, or those of segments, which `are_added` up."""
        terms = self.terms if terms is None else terms
        n_out = (len(terms) or self.n_sums) * self.n_segments
        out = sums.new_empty(n_out)
        scale = sums.new_empty(n_out) if scale is None else scale
        divisor, number = self.divided(call, tensors)
        blocks = (1,) if are_added else self.blocks
        backend.launch(
            kernels.totals.totals_kernel,
            (n_out,),
            sums.device,
            p_sums=sums,
            p_divisor=divisor,
            p_out=out,
            p_scale=scale,
            blocks=blocks,
            divisor=number,
            s_divisor=divisor.stride(0) if divisor is not None and divisor.dim() else 1,
            n_repeats=1 if are_added else self.n_repeats,
            n_segments=self.n_segments,
            n_programs=sums.shape[1],
            TERMS=terms,
            N_TERMS=len(terms),
            N_BLOCKS=len(blocks),
            BLOCK=min(power_of_2(sums.shape[1]), _BLOCK),
            num_warps=4,
        )
        return out, scale


class Sum(Passes):
    """The sum of numbers, each where it lies: no one else needs their gradients in memory."""

    def __init__(self) -> None:
        self.arguments, self.divisor = {}, None

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
    passes: Passes = call.signature.passes(tensors)
    return passes.forward(call, tensors)


def backward(
    call: FusedCall,
    weight: None,
    tensors: Tensors,
    dout: Tensor,
    wanted: Sequence[bool],
    found: Tensor,
) -> Gradients:
    call = call.with_layouts_of(tensors)
    passes: Passes = call.signature.passes(tensors)
    return passes.backward(call, tensors, dout, wanted, found)
