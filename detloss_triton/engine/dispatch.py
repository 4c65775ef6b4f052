"""How an op is called: which evaluator runs it, and how autograd sees it.

- gpu: its Triton kernel; graph: the same, as an operator of a compiled graph
- cpu: its torch reference, block by block of rows
- traced: its torch reference, inside a graph compiled for a CPU
- otherwise the torch reference as it stands: for small inputs, other devices, under torch.func
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.precision import as_indices, as_values

from . import cpu, fused, gpu, graph, modes, traced
from .calls import call_of
from .formula import (
    TEMPORARIES,
    Call,
    Formula,
    FusedFormula,
    Given,
    Input,
    RowFormula,
    Sample,
    is_differentiated,
    is_walkable,
    mapped,
    tensors_of,
)

_TRANSFORMED = "torch.func transforms this call, and no transform looks into a kernel"


class RowOp(RowFormula):
    """A loss (or a few values) per row, differentiable by the inputs declared with `grad`.

    Calling it: `op(*inputs, weight=None, keep=0, **params)`.

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

    def triton(self, launcher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        super().triton(launcher)
        graph.declare(self)
        return launcher

    def __call__(
        self, *inputs: Tensor | None, weight: Tensor | None = None, keep: int = 0, **params: Any
    ) -> Tensor:
        rows = self.check(inputs, weight, keep)
        inputs = tuple(
            None if x is None else as_indices(x) if spec.index else as_values(x)
            for x, spec in zip(inputs, self.inputs, strict=True)
        )
        weight = None if weight is None else as_values(weight)
        call = Call(self, tuple(params.items()), len(rows) if self.values else keep, rows)
        first = inputs[0]
        assert first is not None
        _check_devices(self, first, inputs)
        chosen = _chosen_for(self, first, inputs)
        if chosen == "torch":
            if modes.is_transformed() or not backend.is_cpu(first.device):
                return call.whole(weight, *inputs)
            if modes.is_compiling() and (call.is_summed or self.values):
                return traced.evaluate(call, weight, inputs)
            if not modes.is_compiling() and not cpu.pays(call, inputs):
                return call.whole(weight, *inputs)
        eager, compiled = (gpu, graph) if chosen == "triton" else (cpu, traced)
        evaluator: Any = compiled if modes.is_compiling() else eager
        if not is_differentiated(inputs):
            # Cheaper; and where nothing requires a gradient Dynamo misreads a Function's arguments.
            out, _ = evaluator.forward(call, weight, inputs, [False] * len(inputs))
            return out
        return _Evaluated.apply(call, evaluator, weight, *inputs)


class _Evaluated(torch.autograd.Function):
    """Of a call and its tensors the result, or its entries where they are asked for `apart`.

    Saves the inputs, and the gradients where forward found them: the first backward takes those,
    and a second one finds them anew. What a fused op found is one tensor, and kept. A backward that
    is to be differentiated, or is over a batch of upstream gradients, is autograd's.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Any, evaluator: Any, weight: Tensor | None, *inputs: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.call, ctx.evaluator = call, evaluator
        out, found = evaluator.forward(call, weight, inputs, ctx.needs_input_grad[3:])
        is_kept = isinstance(found, Tensor)
        ctx.found = None if is_kept else found
        ctx.save_for_backward(found if is_kept else None, weight, *inputs)
        # Split here, all losses are of one node of autograd's, which does not see a view of them.
        ctx.is_apart = call.apart is not None and len(out) > 0
        return tuple(unbound(out, call.apart, Tensor.squeeze_)) if ctx.is_apart else out

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        again = torch.is_grad_enabled() and not modes.is_compiling()
        dout = _together(douts) if ctx.is_apart else douts[0]
        if again or modes.is_transformed(dout):
            leaves = [x for x, want in zip(inputs, wanted, strict=True) if want]
            with torch.enable_grad():
                out = ctx.call.whole(weight, *inputs)
            gradients = iter(torch.autograd.grad(out, leaves, dout, create_graph=again))
            return None, None, None, *(next(gradients) if want else None for want in wanted)
        found, ctx.found = ctx.found if kept is None else kept, None
        gradients = ctx.evaluator.backward(ctx.call, weight, tuple(inputs), dout, wanted, found)
        return None, None, None, *gradients


def _together(douts: Sequence[Tensor]) -> Tensor:
    """Upstream gradients of losses (n,), each (1,) or (): what a sum hands down is one number."""
    first = douts[0]
    if all(x is first for x in douts):
        return first.view(()).expand(len(douts))
    return torch.stack([x.view(()) if x.dim() else x for x in douts])


class DirectOp(Formula):
    """An op with a shape of its own and no gradient: matching. Its launcher does the launching.

    Reference and launcher take the same tensors, or tuples of them, and parameters, first the one
    whose device decides, and return the same tensors.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        samples: Callable[..., Iterator[Sample]],
        opaque: bool = False,
    ) -> None:
        super().__init__(reference, samples)
        self.operator = graph.as_operator(self, self._on_torch, "_on_torch") if opaque else None
        # What a CPU runs in place of the reference.
        self.cpu_form: Callable[[Any], Any] | None = None

    def triton(self, launcher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        super().triton(launcher)
        self.launch = graph.as_operator(self, lambda *arguments: launcher(self.given(*arguments)))
        return launcher

    def on_cpu(self, form: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Register what a CPU runs in place of the reference: a function of what is `given`.

        It may look at values, which costs nothing there, or work in pieces that the caches hold.
        """
        self.cpu_form = form
        return form

    def __call__(self, *inputs: Given, **params: Any) -> Any:
        tensors = tensors_of(inputs)
        run = self.operator or self._on_torch
        _check_devices(self, tensors[0], tensors)
        if self.launcher and _chosen_for(self, tensors[0], tensors) == "triton":
            run = self.launch
        if any(x.requires_grad for x in tensors):
            inputs = mapped(Tensor.detach, inputs)
        names = self.parameters[len(inputs) :]
        with torch.no_grad():
            return run(*inputs, *[params[name] for name in names])

    def _on_torch(self, *arguments: Any) -> Any:
        first = tensors_of(arguments)[0]
        if self.cpu_form is not None and modes.host_sees(first.device):
            return self.cpu_form(self.given(*arguments))
        return self.reference(*arguments)


class FusedOp(FusedFormula):
    """Losses (n,) of many tensors at once. Each input is a tuple of tensors, perhaps none."""

    def triton(self, launcher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        super().triton(launcher)
        if self.in_graphs:
            graph.declare_fused(self)
        return launcher

    def __call__(self, *inputs: tuple[Tensor, ...], **params: Any) -> Tensor:
        out: Tensor = self._evaluated(inputs, params)
        return out

    def unbound(self, *inputs: tuple[Tensor, ...], n_rows: int = 0, **params: Any) -> list[Tensor]:
        """The losses one by one, the first `n_rows` as (1,): each may be modified in place."""
        out = self._evaluated(inputs, params, None if modes.is_compiling() else n_rows)
        return unbound(out, n_rows) if isinstance(out, Tensor) else list(out)

    def _evaluated(
        self,
        inputs: tuple[tuple[Tensor, ...], ...],
        params: dict[str, Any],
        apart: int | None = None,
    ) -> Any:
        is_compiling, is_transformed = modes.is_compiling(), modes.is_transformed()
        device = next(x.device for given in inputs for x in given)
        # What is traced or transformed may be no real tensors, and a reference needs no signature.
        is_kept = not is_compiling and not is_transformed and backend.may_be_triton(device)
        call, tensors = call_of(self, inputs, params, apart, is_kept)
        if not call.signature.is_readable:
            inputs = tuple(tuple(as_values(_placed(x, device)) for x in given) for given in inputs)
            call, tensors = call_of(self, inputs, params, apart, is_kept)
            _check_devices(self, tensors[0], tensors)
        evaluator: Any = graph.of_fused if is_compiling else fused
        traced, known = is_compiling and not self.in_graphs, call.signature
        if traced or (
            _chosen(self.name, device, known.dtypes, lambda: known.beyond, is_transformed)
            == "torch"
        ):
            return self.reference(*self.rows(inputs), **params)
        if is_compiling:
            if any(self.dims):
                call, tensors = call_of(self, self.rows(inputs), params, apart, is_kept)
            tensors = _apart(tensors)
        elif not known.is_walkable:
            call, tensors = call_of(self, self.rows(inputs, is_walkable), params, apart, is_kept)
        if not is_differentiated(tensors):
            out, _ = evaluator.forward(call, None, tensors, [False] * len(tensors))
            return out
        return _Evaluated.apply(call, evaluator, None, *tensors)


def unbound(
    x: Tensor, n_rows: int = 0, squeeze: Callable[[Tensor, int], Tensor] = Tensor.squeeze
) -> list[Tensor]:
    """The entries of x along its first dimension, each of which may be modified in place; the first
    `n_rows` keep that dimension.

    They take over the memory of x, which nothing else may use any more, so pass a result that was
    made for this: of `value * factor`, autograd keeps `value`.
    """
    # Autograd refuses to modify one of several views, of which these make a secret; a copy of each
    # would be a launch of each, and so would the backward of each `x[i]`.
    entries = x.unsafe_split(1) if len(x) else ()
    return [*entries[:n_rows], *(squeeze(entry, 0) for entry in entries[n_rows:])]


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """What holds nothing may be anywhere."""
    is_nothing = x.numel() == 0 and x.device != device
    return x.new_empty(x.shape, device=device) if is_nothing else x


def _apart(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """No tensor twice, but a view of it: Dynamo refuses to hand one to a Function twice."""
    out: list[Tensor] = []
    for x in tensors:
        out.append(x.view(x.shape) if any(x is y for y in out) else x)
    return tuple(out)


def _check_devices(op: Formula, first: Tensor, inputs: Sequence[Tensor | None]) -> None:
    """Raise ValueError for tensors on several devices: a kernel would read unmapped memory."""
    device = first.device
    for x in inputs:
        if x is not None and x.device != device:
            raise ValueError(
                f"{op.name}: all tensors must be on one device, got {device} and {x.device}"
            )


def _chosen(
    name: str,
    device: torch.device,
    dtypes: Collection[torch.dtype],
    beyond: Callable[[], str],
    is_transformed: bool,
) -> str:
    """The backend an op runs on; "auto" takes torch for what is beyond its kernel, and warns.

    Raises:
        RuntimeError: where "triton" was asked for and cannot run.
    """
    hindrance = _TRANSFORMED if is_transformed else ""
    chosen = backend.choose(device, dtypes, hindrance)
    reason = beyond() if chosen == "triton" else ""
    if not reason:
        return chosen
    if not backend.is_auto():
        raise RuntimeError(f"backend 'triton' was requested but cannot run: {reason}")
    backend.warn_of_torch(device, f"{name}: {reason}", kind=name)
    return "torch"


def _chosen_for(op: Formula, first: Tensor, inputs: Sequence[Tensor | None]) -> str:
    dtypes = {x.dtype for x in inputs if x is not None}
    beyond, is_transformed = lambda: op.beyond(*inputs), modes.is_transformed()
    return _chosen(op.name, first.device, dtypes, beyond, is_transformed)


def row_loss(
    *inputs: Input,
    samples: Callable[..., Iterator[Sample]],
    skip: bool = False,
    by_entry: bool = False,
    temporaries: int = TEMPORARIES,
) -> Callable[[Callable[..., Tensor]], RowOp]:
    """Declare the decorated torch reference as a row loss over `inputs`, its first parameters.

    With `skip`, a row of weight 0 contributes nothing, whatever it holds. With `by_entry`, the
    reference gives a loss of each entry of the first input. `temporaries` says how many tensors of
    the widest input's size it holds at a time.
    """
    return lambda reference: RowOp(
        reference, inputs, samples, skip=skip, by_entry=by_entry, temporaries=temporaries
    )


def row_map(
    *inputs: Input, values: int, samples: Callable[..., Iterator[Sample]], skip: bool = False
) -> Callable[[Callable[..., Tensor]], RowOp]:
    """Declare the decorated torch reference as a map from rows of `inputs` to `values` numbers.

    With `skip`, the values of a row of weight 0 are 0, whatever it holds.
    """
    return lambda reference: RowOp(reference, inputs, samples, skip=skip, values=values)


def fused_op(
    *,
    levels: tuple[str, ...],
    gradients: tuple[str, ...],
    samples: Callable[..., Iterator[Sample]],
    in_graphs: bool = True,
    maps: Mapping[str, int] | None = None,
    is_of_layers: bool = False,
) -> Callable[[Callable[..., Tensor]], FusedOp]:
    """Declare the decorated torch reference, made of small ops, as one that has its own kernels.

    Its inputs, tuples of tensors, come first. A kernel takes `levels` of them level by level; the
    `gradients` of some are defined. Unless it is to be called `in_graphs`, a compiler fuses the
    reference. Some may be given as `maps`, for which and `is_of_layers` see `FusedFormula`.
    """
    return lambda reference: FusedOp(
        reference, samples, levels, gradients, in_graphs, maps, is_of_layers
    )


def direct(
    *, samples: Callable[..., Iterator[Sample]], opaque: bool = False
) -> Callable[[Callable[..., Any]], DirectOp]:
    """Declare the decorated torch reference as a direct op.

    What is `opaque` a graph does not look into: it calls an operator, which sees values on a CPU.
    """
    return lambda reference: DirectOp(reference, samples, opaque)
