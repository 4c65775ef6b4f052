"""Ops: a torch reference, its Triton launcher, samples and tolerances, declared side by side.

    @row_loss(Input("pred", features=1, grad=True), Input("target", features=1, grad=True), ...)
    def giou_loss(pred, target, eps):     # the declaration is the torch reference
        return 1 - giou(columns(pred), columns(target), eps)

    @giou_loss.triton                     # refused at import if its parameters differ
    def _(pred, target, eps):             # with the kernel's constants that launch.py does not know
        constants = {"LOSS": "giou", "EPS": eps, "OPTION": 0}
        return Tile(kernels.boxes.overlap_kernel, rows=128, constants=constants)

A row op maps rows of its inputs to one loss each, weighs them and sums all but the leading `keep`
dimensions; or (`row_map`) to a few values each, which are returned. The registry is what tests,
`detloss check` and the benchmarks walk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import backend, blocks, entries, launch, traced
from .blocks import Part
from .precision import arithmetic_dtype, as_indices, as_values

REGISTRY: dict[str, Op] = {}

# Largest error allowed to either backend, relative to the largest value, by dtype of the inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Input:
    """One tensor argument of an op: rows, then `features` further dimensions (0 or 1).

    Its entries are values to compute with, of whatever type, or with `index` integers.
    """

    name: str
    features: int = 0
    grad: bool = False
    optional: bool = False
    index: bool = False


@dataclass(frozen=True)
class Sample:
    """Arguments an op accepts; `weight` and the inputs share their row dimensions."""

    inputs: tuple[Tensor | None, ...]
    params: dict[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None


class Op:
    """What the registry holds: name, torch reference, Triton launcher, samples."""

    def __init__(
        self, reference: Callable[..., Any], samples: Callable[..., Iterator[Any]]
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.samples = samples
        self.launcher: Callable[..., Any] | None = None
        self._beyond: Callable[..., str] = lambda *inputs: ""
        self.__doc__ = reference.__doc__
        if self.name in REGISTRY:
            raise TypeError(f"op {self.name!r} is declared twice")
        REGISTRY[self.name] = self

    def triton(self, launcher: Callable[..., Any]) -> Callable[..., Any]:
        """Register the Triton launcher; it takes exactly the reference's parameters."""
        ours = list(inspect.signature(launcher).parameters)
        theirs = list(inspect.signature(self.reference).parameters)
        if ours != theirs:
            raise TypeError(f"launcher of {self.name!r} takes {ours}, its reference {theirs}")
        self.launcher = launcher
        return launcher

    def limited(self, beyond: Callable[..., str]) -> Callable[..., str]:
        """Register what the kernel cannot hold: of the inputs, why not, or an empty string."""
        self._beyond = beyond
        return beyond

    def _backend(self, first: Tensor, dtypes: list[torch.dtype], inputs: tuple[Any, ...]) -> str:
        """The backend to run on; "auto" takes torch for what is beyond the kernel.

        Raises:
            ValueError: where "triton" was asked for, and the inputs are beyond the kernel; or where
                they are on several devices, of which a kernel would read unmapped memory.
        """
        for x in inputs:
            if isinstance(x, Tensor) and x.device != first.device:
                raise ValueError(
                    f"{self.name}: all tensors must be on one device, got {first.device} and "
                    f"{x.device}"
                )
        chosen = backend.choose(first.device, dtypes)
        reason = self._beyond(*inputs) if chosen == "triton" else ""
        if reason and not backend.is_auto():
            raise ValueError(f"{reason} on the Triton backend")
        if reason:
            why = f"{self.name}: {reason.rstrip(',')}"
            backend.warn_of_torch(first.device, why, kind=self.name)
        return "torch" if reason else chosen

    def __repr__(self) -> str:
        return f"<op {self.name}>"


class RowOp(Op):
    """A loss (or a few values) per row, differentiable by the inputs declared with `grad`.

    Calling it: `op(*inputs, weight=None, keep=0, few=False, **params)`. `few` tells a compiled
    graph that of all the rows kept few will be asked for their gradient; not with parameters.

    Shapes:
        inputs: (*rows, features) or (*rows,), any strides, any dtype of real numbers; None where
            optional.
        weight: (*rows,), as these; factor of each row's loss or values. With `skip`, a row of
            weight 0 contributes exactly nothing to losses and gradients, whatever it holds.
        returns: (*rows[:keep],), float32 (float64 for float64 inputs): the weighted losses summed
            over the remaining row dimensions. `keep = number of row dimensions` sums nothing.
            A row map returns (*rows, values).

    Raises:
        ValueError: if inputs disagree in their rows, or one without a gradient requires it.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        inputs: tuple[Input, ...],
        samples: Callable[..., Iterator[Sample]],
        skip: bool = False,
        values: int = 0,
        parts: Callable[..., list[Part]] | None = None,
        temporaries: int = blocks.TEMPORARIES,
    ) -> None:
        super().__init__(reference, samples)
        names = list(inspect.signature(reference).parameters)[: len(inputs)]
        if names != [spec.name for spec in inputs]:
            raise TypeError(f"{self.name}: parameters {names} are not the inputs declared")
        self.inputs = inputs
        self.skip = skip
        self.values = values
        self.parts = parts or blocks.everything
        self.temporaries = temporaries

    def __call__(
        self,
        *inputs: Tensor | None,
        weight: Tensor | None = None,
        keep: int = 0,
        few: bool = False,
        **params: Any,
    ) -> Tensor:
        rows = self._check(inputs, weight, keep)
        inputs = tuple(
            None if x is None else as_indices(x) if spec.index else as_values(x)
            for x, spec in zip(inputs, self.inputs, strict=True)
        )
        weight = None if weight is None else as_values(weight)
        keep = len(rows) if self.values else keep
        if few and (params or keep < len(rows)):
            raise ValueError(f"{self.name}: few needs all rows kept, and an op without parameters")
        call = Call(self, tuple(sorted(params.items())), keep, rows, few)
        first = inputs[0]
        assert first is not None
        chosen = self._backend(first, [x.dtype for x in inputs if x is not None], inputs)
        by_cpu = backend.is_cached_by_cpu(first.device)
        if chosen == "torch" and torch.compiler.is_compiling() and by_cpu:
            return traced.evaluate(call, weight, inputs)
        if backend.is_transformed() or (
            chosen == "torch" and not blocks.pays(call, weight, inputs)
        ):
            return call.whole(weight, *inputs)
        if chosen == "torch":
            weight = entries.factor(weight)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
            # Cheaper; and where nothing requires a gradient Dynamo misreads a Function's arguments.
            out, _ = _MODULES[chosen].forward(call, weight, inputs, [False] * len(inputs))
            return out
        return _Rows.apply(call, chosen, weight, *inputs)

    def _check(
        self, inputs: tuple[Tensor | None, ...], weight: Tensor | None, keep: int
    ) -> torch.Size:
        if len(inputs) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise ValueError(f"{self.name}: expected the inputs ({names}), got {len(inputs)}")
        rows: torch.Size | None = None
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x is None:
                if not spec.optional:
                    raise ValueError(f"{self.name}: {spec.name} is required, got None")
                continue
            if x.dim() < spec.features:
                raise ValueError(
                    f"{self.name}: {spec.name} needs a last dimension, got shape {tuple(x.shape)}"
                )
            here = x.shape[: x.dim() - spec.features]
            if rows is None:
                rows = here
            elif here != rows:
                raise ValueError(
                    f"{self.name}: {spec.name} has rows {tuple(here)}, expected {tuple(rows)} "
                    f"as in {self.inputs[0].name}"
                )
            if x.is_complex() or (spec.index and x.is_floating_point() and x.numel() > 0):
                expected = "integers" if spec.index else "real numbers"
                raise ValueError(f"{self.name}: {spec.name} must hold {expected}, got {x.dtype}")
            if x.requires_grad and not spec.grad:
                raise ValueError(
                    f"{self.name}: no gradient is defined for {spec.name}; detach it first"
                )
        assert rows is not None
        if weight is not None:
            if weight.shape != rows:
                raise ValueError(
                    f"{self.name}: weight has shape {tuple(weight.shape)}, expected {tuple(rows)}"
                )
            if weight.requires_grad:
                raise ValueError(f"{self.name}: no gradient is defined for weight; detach it first")
        if not 0 <= keep <= len(rows):
            raise ValueError(f"{self.name}: keep must be in [0, {len(rows)}], got {keep}")
        return rows


class DirectOp(Op):
    """An op with a shape of its own and no gradient: matching. Its launcher does the launching.

    Reference and launcher take the same tensors and parameters, first the one whose device decides,
    and return the same tensors.
    """

    def __call__(self, *tensors: Tensor, **params: Any) -> Any:
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        chosen = self._backend(tensors[0], dtypes, tensors)
        run = self.reference if chosen == "torch" else self.launcher
        assert run is not None
        with torch.no_grad():
            return run(*(t.detach() for t in tensors), **params)


@dataclass(frozen=True)
class Call:
    """One call of a row loss: everything about it but its tensors."""

    op: RowOp
    params: tuple[tuple[str, Any], ...]
    keep: int
    rows: torch.Size
    few: bool = False

    def losses(self, weight: Tensor | None, *inputs: Tensor | None, blank: bool = True) -> Tensor:
        """The weighted losses of some of the rows, in float32 or float64.

        With `blank`, autograd too finds nothing in rows that are skipped, whatever they hold.
        """
        dtype = self.dtype(inputs)
        skip = weight is not None and self.op.skip
        if weight is not None and skip and blank:
            used = weight != 0
            inputs = tuple(
                x
                if x is None or spec.index
                else torch.where(used.unsqueeze(-1) if spec.features else used, x, 0)
                for spec, x in zip(self.op.inputs, inputs, strict=True)
            )
        losses = self.op.reference(
            *(
                x if x is None or spec.index else x.to(dtype)
                for spec, x in zip(self.op.inputs, inputs, strict=True)
            ),
            **dict(self.params),
        )
        if torch.compiler.is_compiling() and losses.dim() > len(self.rows) and not self.op.values:
            if self.keep or not self.rows:
                losses = losses.sum(-1)
            elif weight is not None:
                # Left by the reference to be summed with the rows, in one loop.
                weight = weight.unsqueeze(-1)
        return self.weighed(losses, weight, blank)

    def weighed(self, losses: Tensor, weight: Tensor | None, blank: bool) -> Tensor:
        if weight is None:
            return losses
        if self.op.values:
            weight = weight.unsqueeze(-1)
        losses = losses * weight.to(losses.dtype)
        return losses if blank or not self.op.skip else entries.without_skipped(losses, weight)

    def whole(self, weight: Tensor | None, *inputs: Tensor | None) -> Tensor:
        """The reference on everything at once: for small inputs, and to be compiled."""
        return self.summed(self.losses(weight, *inputs))

    def summed(self, losses: Tensor) -> Tensor:
        """The losses of all rows, summed but for the leading `keep` dimensions."""
        if self.keep == len(self.rows):
            return losses
        return losses.flatten(self.keep).sum(-1) if self.keep else losses.sum()

    def dtype(self, inputs: tuple[Tensor | None, ...]) -> torch.dtype:
        """What the losses are computed in."""
        return arithmetic_dtype(*inputs)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.rows[: self.keep], *([self.op.values] if self.op.values else []))


_MODULES: dict[str, Any] = {"triton": launch, "torch": blocks}


class _Rows(torch.autograd.Function):
    """Saves the inputs, and the gradients where forward found them: the first backward takes those,
    and a second one finds them anew. One that is to be differentiated, or is over a batch of
    upstream gradients, is autograd's.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, chosen: str, weight: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        ctx.call, ctx.chosen = call, chosen
        ctx.save_for_backward(weight, *inputs)
        wanted = ctx.needs_input_grad[3:]
        out, ctx.ready = _MODULES[chosen].forward(call, weight, inputs, wanted)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if again or backend.is_transformed(dout):
            leaves = [x for x, want in zip(inputs, wanted, strict=True) if want]
            with torch.enable_grad():
                out = ctx.call.whole(weight, *inputs)
            found = iter(torch.autograd.grad(out, leaves, dout, create_graph=again))
            return None, None, None, *(next(found) if want else None for want in wanted)
        ready, ctx.ready = ctx.ready, None
        gradients = _MODULES[ctx.chosen].backward(
            ctx.call, weight, tuple(inputs), dout, wanted, ready
        )
        return None, None, None, *gradients


def row_loss(
    *inputs: Input,
    samples: Callable[..., Iterator[Sample]],
    skip: bool = False,
    parts: Callable[..., list[Part]] | None = None,
    temporaries: int = blocks.TEMPORARIES,
) -> Callable[[Callable[..., Tensor]], RowOp]:
    """Declare the decorated torch reference as a row loss over `inputs`, its first parameters.

    With `skip`, a row of weight 0 contributes nothing, whatever it holds. `parts(weight, *inputs)`
    says how a CPU evaluates rows that do not all take the same work, see `blocks.Part`;
    `temporaries` how many tensors of the widest input's size it holds while it does.
    """
    return lambda reference: RowOp(
        reference, inputs, samples, skip=skip, parts=parts, temporaries=temporaries
    )


def row_map(
    *inputs: Input, values: int, samples: Callable[..., Iterator[Sample]], skip: bool = False
) -> Callable[[Callable[..., Tensor]], RowOp]:
    """Declare the decorated torch reference as a map from rows of `inputs` to `values` numbers.

    With `skip`, the values of a row of weight 0 are 0, whatever it holds.
    """
    return lambda reference: RowOp(reference, inputs, samples, skip=skip, values=values)


def direct(*, samples: Callable[..., Iterator[Sample]]) -> Callable[[Callable[..., Any]], DirectOp]:
    """Declare the decorated torch reference as a direct op."""
    return lambda reference: DirectOp(reference, samples)
