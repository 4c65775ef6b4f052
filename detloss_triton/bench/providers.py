"""Who computes what is timed: our backends, what Inductor makes of our references, and peers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend, sum_losses
from detloss_triton.engine import TOLERANCE, RowOp, tensors_of
from detloss_triton.selfcheck import relative_error

from .batches import Batch, Draw
from .cases import CriterionCase, OpCase
from .measure import Step
from .trees import leaves, mapped, shared

Tree = Any
Run = Callable[[Tree], Any]

# Of gradients after matching and several losses; an op's own tolerance is tighter.
CRITERION_TOLERANCE = 2e-4
# Of the compiler and peers: how much of an error message a report can hold.
_MESSAGE = 160


class Absent(Exception):
    """Why a provider cannot compute a task here; shown in every report."""


class Wrong(Exception):
    """Why a provider is not timed: what it computes is something else."""


@dataclass(frozen=True)
class Task:
    """One thing to compute on one device: `compute(pack(inputs))`, as tensors to be summed.

    `pack` is what cannot be compiled, since its shapes change in every step; `batch` makes the
    criterion.
    """

    case: OpCase | CriterionCase
    inputs: Tree
    pack: Run
    compute: Run
    device: torch.device
    params: dict[str, Any] = field(default_factory=dict)
    batch: Batch | None = None

    @property
    def kind(self) -> str:
        return "op" if isinstance(self.case, OpCase) else "criterion"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[torch.float32] if self.kind == "op" else CRITERION_TOLERANCE

    @property
    def differentiable(self) -> bool:
        return any(x.requires_grad for x in self.tensors())

    def run(self, tree: Tree) -> Any:
        return self.compute(self.pack(tree))

    def tensors(self) -> list[Tensor]:
        return [x for _, x in leaves(self.inputs)]

    def copies(self, n: int) -> list[Tree]:
        """The inputs, and n - 1 further sets like them elsewhere in memory."""

        def copy(_: str, x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_(x.requires_grad)

        return [self.inputs, *(mapped(shared(copy), self.inputs) for _ in range(n - 1))]


def op_task(
    case: OpCase, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Task:
    """The op on a batch of that many images; losses are summed over all rows."""
    sample = case.sample(Draw(0), batch)

    sample = sample.changed(
        lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device)
    )
    for x, takes_gradient in zip(sample.inputs, case.differentiable, strict=False):
        for each in tensors_of(x):
            each.requires_grad_(takes_gradient)
    inputs = {"inputs": sample.inputs, "weight": sample.weight}

    def compute(tree: Tree) -> Any:
        if isinstance(case.op, RowOp):
            return case.op(*tree["inputs"], weight=tree["weight"], **sample.params)
        return case.op(*tree["inputs"], **sample.params)

    return Task(case, inputs, lambda tree: tree, compute, device, sample.params)


def criterion_task(
    case: CriterionCase, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any
) -> Task:
    """The criterion and the sum of its losses, as a training step uses them."""
    batch = case.batch(**changes).on(device, dtype)
    criterion: Any = batch.criterion(device)

    if case.matcher:
        return Task(case, *_matching(batch.inputs, criterion.matcher), device)

    def pack(tree: Tree) -> Tree:
        if "outputs" not in tree:
            return tree
        outputs = tree["outputs"]
        targets, dn_meta = criterion.prepare(tree["targets"], outputs.get("dn_meta"))
        return {"outputs": {**outputs, "dn_meta": dn_meta}, "targets": targets}

    def compute(tree: Tree) -> Tensor:
        return sum_losses(criterion(**tree))

    return Task(case, batch.inputs, pack, compute, device, batch=batch)


def _matching(inputs: Tree, matcher: Any) -> tuple[Tree, Run, Run]:
    """(inputs, pack, compute) of matching alone: no gradients."""

    def compute(tree: Tree) -> list[Tensor]:
        return [x for pair in matcher(tree["outputs"], tree["targets"]) for x in pair]

    return mapped(lambda _, x: x.detach(), inputs), lambda tree: tree, compute


@dataclass(frozen=True)
class Provider:
    """A name, and how it computes a task; `make` raises `Absent` where it cannot."""

    name: str
    make: Callable[[Task], Run]
    backend: str = "torch"

    def active(self) -> AbstractContextManager[object]:
        return backend.use_backend(self.backend)  # type: ignore[arg-type]


def _eager(task: Task) -> Run:
    return task.run


def _compiled(task: Task) -> Run:
    # One shape at a time, as in a training of fixed image size.
    torch.compiler.reset()
    compute = torch.compile(task.compute, dynamic=False)
    return lambda tree: compute(task.pack(tree))


def _triton(task: Task) -> Run:
    if task.device.type == "cpu":
        raise Absent("needs a GPU: interpreted kernels prove numbers, not speed")
    reason = backend.why_not_triton(task.device, [torch.float32])
    if reason:
        raise Absent(reason)
    return task.run


EAGER, COMPILED, TRITON = "ours torch", "ours torch compiled", "ours Triton"
OURS = (
    Provider(EAGER, _eager),
    Provider(COMPILED, _compiled),
    Provider(TRITON, _triton, "triton"),
)


def first_line(error: BaseException) -> str:
    """An error in one line, fit to be published: file names without their folders."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(/[^\s/:]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text}"[:_MESSAGE]


def total(out: Any) -> Tensor:
    """The number that is differentiated."""
    first: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return first if first.dim() == 0 else first.sum()


def step(provider: Provider, run: Run, trees: Sequence[Tree], backward: bool) -> Step:
    """A step of one provider; each call takes the next of the sets of inputs."""
    turns = itertools.cycle([(t, [x for _, x in leaves(t) if x.requires_grad]) for t in trees])

    def one() -> Any:
        tree, wanted = next(turns)
        with provider.active():
            out = run(tree)
            if not backward:
                return out
            return out, torch.autograd.grad(total(out), wanted, materialize_grads=True)

    return one


def results(provider: Provider, run: Run, task: Task) -> list[Tensor]:
    """What a provider computes from the task's inputs: outputs, then gradients."""
    out = step(provider, run, [task.inputs], task.differentiable)()
    out, gradients = out if task.differentiable else (out, ())
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    return [x.detach() for x in (*outputs, *gradients)]


def truth(double: Task) -> list[Tensor]:
    """The same in float64, by the torch backend, on the CPU."""
    return results(OURS[0], double.run, double)


def error_of(provider: Provider, run: Run, task: Task, true: Sequence[Tensor]) -> float:
    """Largest error of outputs and gradients, each relative to its largest true value."""
    ours = results(provider, run, task)
    return max(relative_error(a, b) for a, b in zip(ours, true, strict=True))
