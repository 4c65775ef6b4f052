"""A whole criterion as one graph of launches: checked and matched by Python once, then replayed.

A call's signature is all that it depends on but the values of its tensors (`signature.py`). A
signature that comes again is recorded, forward and backward each as a graph (`recorder.py`), on
memory of its own; from then on a call copies its tensors there, or leaves them where they always
are, and replays.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import backend, ranks, validate
from .criteria.levels import has_hooks
from .engine import modes
from .recorded import Graph, Recorded, Replay, Step
from .recorder import Recorder, recorder_of
from .shapes import check_counts
from .signature import State, described, layout, leaves, mapped
from .warn import warn_once

_Module = TypeVar("_Module", bound=nn.Module)

# Under this name a criterion holds its graphs.
_HELD = "_graphs_of_calls"
# Signatures without a graph that are remembered.
_MOST_KNOWN = 256


def graphed(criterion: _Module, *, max_graphs: int = 8, warmup: int = 1, slots: int = 1) -> _Module:
    """The criterion with its steps replayed as graphs of launches: same call, losses, gradients.

    It shares modules and tensors with the one given, is of a class derived from its class, and has
    one more method, `graphs()`, which lists a `Recorded` for every graph. On a CPU, in a compiled
    step, under `torch.func`, in inference mode, while values are checked and while somebody records
    a graph around it, it is the criterion. So it is, with a warning that says why, for a call that
    waits for the device, or whose arguments or modules a graph cannot know.

    A number that is an argument of its own, as `avg_factor`, may be another in each step.

    Args:
        max_graphs: signatures that have graphs at a time; the one not used for longest goes.
        warmup: calls of a signature that run eagerly before it is recorded.
        slots: calls of a signature whose backward may be waiting at a time.

    Raises:
        RuntimeError: from a backward whose graph has run for later calls since; from one with
            `create_graph=True`.
    """
    check_counts("graphed", 1, max_graphs=max_graphs, warmup=warmup, slots=slots)
    plain = criterion.plain() if isinstance(criterion, _Graphed) else criterion
    kind: Any = type(plain)
    out: Any = nn.Module.__new__(_class_of(kind))
    vars(out).update(vars(plain))
    run = functools.partial(kind.forward, out)
    vars(out)[_HELD] = _Graphs(out, run, max_graphs, warmup, slots)
    return out


class _Graphed:
    """What a criterion's class gains."""

    def graphs(self) -> list[Recorded]:
        held: _Graphs = vars(self)[_HELD]
        return held.recorded()

    def plain(self) -> nn.Module:
        """The criterion without graphs."""
        kind = type(self).__mro__[2]
        out: nn.Module = nn.Module.__new__(kind)
        vars(out).update({name: x for name, x in vars(self).items() if name != _HELD})
        return out

    def __reduce__(self) -> Any:
        held: _Graphs = vars(self)[_HELD]
        options = {name: getattr(held, name) for name in ("max_graphs", "warmup", "slots")}
        return functools.partial(graphed, **options), (self.plain(),)


@functools.cache
def _class_of(kind: Any) -> Any:
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if modes.is_compiling() or len(args) > len(names) or set(names[: len(args)]) & {*kwargs}:
            return kind.forward(self, *args, **kwargs)
        return vars(self)[_HELD]({**dict(zip(names, args, strict=False)), **kwargs})

    members = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (_Graphed, kind), {**members, "forward": forward})


@dataclass
class _Known:
    """What has been seen of a signature.

    Args:
        storages: of the tensors of its last eager call, where they may be left in place.
    """

    calls: int = 0
    refused: bool = False
    turn: int = 0
    storages: list[StorageWeakRef] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)


class _Graphs:
    """The graphs of one criterion, by signature."""

    def __init__(
        self,
        criterion: nn.Module,
        run: functools.partial[Any],
        max_graphs: int,
        warmup: int,
        slots: int,
    ) -> None:
        self.criterion, self.run = criterion, run
        self.max_graphs, self.warmup, self.slots = max_graphs, warmup, slots
        self.state = State(criterion, without=_HELD)
        self.known: OrderedDict[Hashable, _Known] = OrderedDict()

    def recorded(self) -> list[Recorded]:
        return [graph.recorded() for known in self.known.values() for graph in known.graphs]

    def __call__(self, arguments: dict[str, Any]) -> Any:
        device, recorder = self._place(arguments)
        if recorder is None:
            return self.run(**arguments)
        given, repeatable = arguments, getattr(self.criterion, "repeatable", dict)
        try:
            arguments = repeatable(given)
        except (AttributeError, KeyError, TypeError, ValueError):
            return self.run(**given)  # which says what is wrong
        numbers = {name: x for name, x in arguments.items() if _is_number(x)}
        fixed = {name: x for name, x in arguments.items() if name not in numbers}
        tensors: list[Tensor] = []
        try:
            tree = described(fixed, tensors, {})
        except TypeError as error:
            self._warn(error)
            return self.run(**arguments)
        if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
            return self.run(**arguments)
        if not all(0 < x < float("inf") for x in numbers.values()):
            return self.run(**arguments)  # which may refuse it
        state = self.state.key()
        learned = [x for x in self.state.tensors if x.requires_grad]
        step = Step(fixed, numbers, tensors, learned, device)
        key = (
            tree,
            (*numbers,),
            tuple(map(layout, tensors)),
            backend.settings(device),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            ranks.are_several(),
            state,
        )
        known = self.known.setdefault(key, _Known())
        self.known.move_to_end(key)
        graph = self._graph(known, step, recorder)
        if graph is None:
            try:
                return self.run(**arguments)
            except (TypeError, ValueError):
                pass
            return self.run(**given)  # whose error speaks of what was given
        if not any(graph.taught):
            with torch.no_grad():
                losses = graph.forward(step)
        else:
            losses = Replay.apply(graph, step, *step.tensors, *step.learned)
        entries = iter(losses)
        return mapped(lambda x: next(entries) if isinstance(x, Tensor) else x, graph.losses)

    def _place(self, arguments: dict[str, Any]) -> tuple[torch.device, Recorder | None]:
        """The first of the tensors' devices where something can be recorded, and its recorder;
        none where no graph may stand for the call."""
        if not (validate.enabled() or torch.is_inference_mode_enabled() or modes.is_transformed()):
            for _, x in leaves(arguments):
                if isinstance(x, Tensor) and (recorder := recorder_of(x.device)) is not None:
                    return x.device, recorder
        return torch.device("cpu"), None

    def _warn(self, error: BaseException) -> None:
        while error.__context__ is not None and not error.__suppress_context__:
            error = error.__context__  # what torch says last is that recording failed
        name = type(self.criterion).__name__
        warn_once(
            f"graphed {name}: calls like this run without a graph: {error}. Said once for each "
            "reason"
        )

    def _graph(self, known: _Known, step: Step, recorder: Recorder) -> Graph | None:
        """The graph whose turn it is; None for a call that runs eagerly."""
        if known.refused:
            return None
        if known.calls < self.warmup:
            known.calls += 1
            known.storages = [StorageWeakRef(x.untyped_storage()) for x in step.tensors]
            self._forget()
            return None
        slot = known.turn % self.slots
        known.turn += 1
        has_one = slot < len(known.graphs)
        if has_one and known.graphs[slot].fits(step):
            return known.graphs[slot]
        shared = _where_they_were(step, known.storages)
        if has_one:
            shared &= known.graphs[slot].places.keys()  # what has moved once will move again
            known.graphs.clear()
        try:
            graph = self._record(step, shared, recorder)
        except Exception as error:
            known.refused = True
            self._warn(error)
            return None
        known.graphs.append(graph)
        self._forget()
        return graph

    def _record(self, step: Step, shared: set[int], recorder: Recorder) -> Graph:
        parts = [*self.criterion.modules()][1:]
        hooked = next((part for part in parts if has_hooks(part)), None)
        if hooked is not None:
            raise RuntimeError(f"{type(hooked).__name__} has hooks, which a graph would not call")
        before = self.state.key()
        graph = Graph(self.run, step, shared, self.state.tensors, recorder)
        if self.state.key() != before:
            raise RuntimeError("the criterion changes its own settings while it runs")
        return graph

    def _forget(self) -> None:
        """Let go of the signatures that have not come for longest."""
        with_graphs = [key for key, known in self.known.items() if known.graphs]
        without = [key for key, known in self.known.items() if not known.graphs]
        for key in (*with_graphs[: -self.max_graphs], *without[:-_MOST_KNOWN]):
            del self.known[key]


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _where_they_were(step: Step, storages: Sequence[StorageWeakRef]) -> set[int]:
    """Which tensors have the very memory, not freed since, that they had at an earlier call."""
    pairs = enumerate(zip(step.tensors, storages, strict=True))
    return {
        i
        for i, (x, before) in pairs
        if x.device == step.device
        and not before.expired()
        and StorageWeakRef(x.untyped_storage()) == before
    }
