"""One step, recorded forward and backward, and replayed on other values."""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ranks
from .precision import arithmetic_dtype
from .recorder import Recorder
from .signature import leaves, mapped


class Recorded(NamedTuple):
    """A graph: shapes of what it was recorded with, how often it ran forward, and the bytes that
    its copies of inputs, its losses and gradients take. What it needs for a while is shared."""

    signature: str
    replays: int
    bytes: int


@dataclass
class Step:
    """One call: its arguments, of which numbers may change, and the tensors in them.

    Args:
        learned: tensors of the criterion that require gradients.
        device: where its graph runs. The host's numbers may lie elsewhere.
    """

    arguments: dict[str, Any]
    numbers: dict[str, Any]
    tensors: list[Tensor]
    learned: list[Tensor]
    device: torch.device


class Graph:
    """The forward and backward of one signature, recorded on tensors that stay where they are."""

    def __init__(
        self,
        run: functools.partial[Any],
        step: Step,
        shared: set[int],
        state: Sequence[Tensor],
        recorder: Recorder,
    ) -> None:
        """Record the step.

        Args:
            shared: tensors that are read where they are; there is a copy of all others.
            state: what the criterion may write to, which a rehearsal leaves as it was.
        """
        self.name = type(run.args[0]).__name__
        self.n_runs = 0
        self.places = {i: step.tensors[i].data_ptr() for i in shared}
        ours = []
        for i, x in enumerate(step.tensors):
            data = x.detach()
            if i not in shared:
                data = torch.empty_like(data, device=step.device).copy_(data)
            ours.append(data.requires_grad_(x.requires_grad))
        self.inputs = [*ours, *step.learned]
        self.copied = _at_once(step.tensors, shared)
        dtype = arithmetic_dtype(*ours)
        self.numbers = {
            name: torch.full((), float(x), dtype=dtype, device=step.device)
            for name, x in step.numbers.items()
        }
        by_id = dict(zip(map(id, step.tensors), ours, strict=True))
        self.run = functools.partial(
            run, **mapped(lambda x: by_id.get(id(x), x), step.arguments), **self.numbers
        )
        self.signature = _text(step)

        def rehearsed() -> None:
            outputs = self._forward()
            self.upstream, self.zeros = ([torch.zeros_like(x) for x in outputs] for _ in range(2))
            self._backward()

        with _without_cached_casts():
            with _as_it_was(state), ranks.rehearsal() as unsent:
                recorder.rehearse(rehearsed)
            if unsent and (reason := ranks.why_not_recorded()):
                raise RuntimeError(reason)
            self.outputs, self.replay = recorder.record(self._forward)
            self.gradients, self.replay_backward = recorder.record(self._backward)
        self.at_once = [_at_once(x) for x in (self.outputs, self.upstream, self.gradients)]

    def fits(self, step: Step) -> bool:
        """Whether the tensors that are not copied are where they were."""
        return all(step.tensors[i].data_ptr() == place for i, place in self.places.items())

    def recorded(self) -> Recorded:
        own = [self.inputs[i] for group in self.copied for i in group]
        tensors = [*own, *self.outputs, *(x for x in self.gradients if x is not None)]
        n_bytes = sum(x.numel() * x.element_size() for x in tensors)
        return Recorded(self.signature, self.n_runs, n_bytes)

    def forward(self, step: Step) -> list[Tensor]:
        """The losses of new inputs, in memory that is the caller's."""
        self.n_runs += 1
        _copy(self.inputs, step.tensors, self.copied)
        for name, x in step.numbers.items():
            self.numbers[name].fill_(float(x))
        self.replay()
        return _copies(self.outputs, self.at_once[0])

    def backward(self, n_runs: int, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, in memory that is the caller's; of the run with this number."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"graphed {self.name}: gradients of gradients, which create_graph=True asks for, "
                "are not in its graphs: call the criterion that was given to graphed()"
            )
        if n_runs != self.n_runs:
            raise RuntimeError(
                f"graphed {self.name}: backward of a call after {self.n_runs - n_runs} later "
                "call(s) of the same shapes, which have overwritten what it needs: call backward "
                "before the next forward, or let graphed(criterion, slots=N) keep N calls"
            )
        given = [z if x is None else x for x, z in zip(upstream, self.zeros, strict=True)]
        _copy(self.upstream, given, self.at_once[1])
        self.replay_backward()
        return _copies(self.gradients, self.at_once[2])

    def _forward(self) -> list[Tensor]:
        self.losses = self.run()
        self.live = [x for _, x in leaves(self.losses) if isinstance(x, Tensor)]
        self.taught = [x.requires_grad for x in self.live]
        return [x.detach() for x in self.live]

    def _backward(self) -> list[Tensor | None]:
        wanted = [i for i, x in enumerate(self.inputs) if x.requires_grad]
        found: list[Tensor | None] = [None] * len(self.inputs)
        if not any(self.taught):
            return found
        pairs = zip(self.live, self.upstream, self.taught, strict=True)
        losses, upstream = zip(*((x, g) for x, g, taught in pairs if taught), strict=True)
        gradients = torch.autograd.grad(
            losses,
            [self.inputs[i] for i in wanted],
            upstream,
            # What it keeps of forward is then not lent to other graphs of the pool.
            retain_graph=True,
            allow_unused=True,
        )
        for i, gradient in zip(wanted, gradients, strict=True):
            found[i] = gradient
        return found


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        losses = graph.forward(step)
        ctx.graph, ctx.n_runs = graph, graph.n_runs
        ctx.set_materialize_grads(False)
        pairs = zip(losses, graph.taught, strict=True)
        ctx.mark_non_differentiable(*(x for x, taught in pairs if not taught))
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.backward(ctx.n_runs, upstream)


def _text(step: Step) -> str:
    kinds = [
        (path, f"{str(x.dtype).partition('.')[2]} {tuple(x.shape)}")
        for path, x in leaves(step.arguments)
        if isinstance(x, Tensor)
    ]
    return ", ".join(f"{path} {kind}" for path, kind in kinds)


def _at_once(tensors: Sequence[Tensor | None], without: Collection[int] = ()) -> list[list[int]]:
    """Indices of the tensors, in lists of those that one launch can copy; of None there is none."""
    lists: dict[Hashable, list[int]] = {}
    for i, x in enumerate(tensors):
        if x is not None and i not in without:
            is_dense = torch.empty_like(x, device="meta").stride() == x.stride()
            kind = (x.dtype, x.device) if is_dense else i
            lists.setdefault(kind, []).append(i)
    return [*lists.values()]


def _copy(to: Sequence[Tensor], of: Sequence[Tensor], at_once: Sequence[Sequence[int]]) -> None:
    for group in at_once:
        torch._foreach_copy_([to[i] for i in group], [of[i] for i in group])


def _copies(tensors: Sequence[Tensor | None], at_once: Sequence[Sequence[int]]) -> list[Any]:
    out: list[Tensor | None] = [None] * len(tensors)
    for group in at_once:
        of: list[Any] = [tensors[i] for i in group]
        # A product with 1 keeps every bit.
        copies = torch._foreach_mul(of, 1) if of[0].is_floating_point() else map(torch.clone, of)
        for i, x in zip(group, copies, strict=True):
            out[i] = x
    return out


@contextmanager
def _as_it_was(state: Sequence[Tensor]) -> Iterator[None]:
    """Undo what is written to the tensors."""
    before = [(x, x.detach().clone(), x._version) for x in state]
    yield
    with torch.no_grad():
        for x, values, version in before:
            if x._version != version:
                x.copy_(values)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Have autocast cast anew what is read: a graph must not hold what was cast before it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
