"""Operators of a compiled graph: each op, and its gradient, as an eager step runs it.

On a GPU these are all there is, as Dynamo traces no kernel that takes tuples. On a CPU, where
`traced` has the compiler fuse an op, they find the gradients of few rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, fused, gpu
from .calls import FusedCall, call_of
from .formula import Call, Formula, FusedFormula, Inputs, RowFormula
from .operators import opaque

# The types that torch's schema language has for parameters.
_TYPES = {
    "float": "float",
    "int": "SymInt",
    "bool": "bool",
    "str": "str",
    "tuple[float, ...]": "float[]",
    "tuple[int, ...]": "SymInt[]",
    "tuple[Tensor, ...]": "Tensor[]",
    "Tensor | None": "Tensor?",
}

# (forward, backward) of each row op.
_operators: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def forward(
    call: Call, weight: Tensor | None, inputs: Inputs, wanted: Sequence[bool]
) -> tuple[Tensor, None]:
    """As `gpu.forward`, by an operator."""
    run, _ = _operators[call.op.name]
    return run(weight, *inputs, *_values(call), call.keep), None


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    found: None,
) -> list[Tensor | None]:
    """As `gpu.backward`, by an operator."""
    return _gradients(call, weight, inputs, dout, wanted, on_cpu=False)


def backward_on_cpu(
    call: Call, weight: Tensor | None, inputs: Inputs, dout: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `cpu.backward`, by an operator."""
    return _gradients(call, weight, inputs, dout, wanted, on_cpu=True)


def _gradients(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    on_cpu: bool,
) -> list[Tensor | None]:
    _, run = _operators[call.op.name]
    found = iter(run(weight, *inputs, *_values(call), call.keep, dout, list(wanted), on_cpu))
    return [next(found) if want else None for want in wanted]


def as_operator(op: Formula, function: Callable[..., Any], suffix: str = "") -> Callable[..., Any]:
    """A function of the parameters of an op without rows, an operator where a graph calls it."""
    signature = inspect.signature(op.reference)
    arguments = [
        f"{_TYPES.get(p.annotation, p.annotation)} {p.name}" for p in signature.parameters.values()
    ]
    n_results = str(signature.return_annotation).count("Tensor")
    results = "Tensor" if n_results == 1 else f"({', '.join(['Tensor'] * n_results)})"
    schema = f"({', '.join(arguments)}) -> {results}"

    def fake(*arguments: Any) -> Any:  # what gives the shapes is declared later
        return op.shapes(op.given(*arguments)) if op.shapes else op.reference(*arguments)

    return opaque(schema, fake, name=op.name + suffix)(function)


class of_fused:
    """A fused op as an eager step runs it, by operators."""

    @staticmethod
    def forward(
        call: FusedCall, weight: None, tensors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        run, _ = _operators[call.op.name]
        return run(*map(list, call.inputs(tensors)), *_values(call))

    @staticmethod
    def backward(
        call: FusedCall,
        weight: None,
        tensors: Sequence[Tensor],
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> list[Tensor | None]:
        _, run = _operators[call.op.name]
        inputs = map(list, call.inputs(tensors))
        gradients = iter(run(*inputs, *_values(call), dout, list(wanted), found))
        return [next(gradients) if want else None for want in wanted]


def declare_fused(op: FusedFormula) -> None:
    """Declare the operators of a fused op."""
    n = len(op.inputs)
    signature = inspect.signature(op.reference).parameters.values()
    common = ", ".join(f"{_TYPES[p.annotation]} {p.name}" for p in signature)

    def call(args: Sequence[Any], is_kept: bool = True) -> tuple[FusedCall, tuple[Tensor, ...]]:
        constants = (tuple(v) if isinstance(v, list) else v for v in args[n:])
        named = dict(zip(op.parameters[n:], constants, strict=True))
        return call_of(op, args[:n], named, is_kept=is_kept)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        this, tensors = call(args)
        return fused.forward(this, None, tensors, ())

    def run_backward(*args: Any) -> list[Tensor]:
        *args_of_call, dout, wanted, found = args
        this, tensors = call(args_of_call)
        gradients = fused.backward(this, None, tensors, dout, wanted, found)
        return [g for g in gradients if g is not None]

    def like(*args: Any) -> tuple[Tensor, Tensor]:
        this, tensors = call(args, is_kept=False)
        passes = this.signature.passes(tensors)
        sizes = passes.n_losses(), passes.n_found()
        out, found = (tensors[0].new_empty((n,), dtype=torch.float32) for n in sizes)
        return out, found

    def gradients_like(*args: Any) -> list[Tensor]:
        *args_of_call, _, wanted, _ = args
        _, tensors = call(args_of_call, is_kept=False)
        return [torch.empty_like(x) for x, want in zip(tensors, wanted, strict=True) if want]

    backward_schema = f"({common}, Tensor dout, bool[] wanted, Tensor found) -> Tensor[]"
    _operators[op.name] = (
        opaque(f"({common}) -> (Tensor, Tensor)", like, name=op.name)(run),
        opaque(backward_schema, gradients_like, name=f"{op.name}_backward")(run_backward),
    )


def declare(op: RowFormula) -> None:
    """Declare the operators of a row op: at its import, as none can be declared in a graph."""
    n = len(op.inputs)
    params = list(inspect.signature(op.reference).parameters.values())[n:]
    arguments = ["Tensor? weight"]
    arguments += [f"Tensor{'?' * spec.optional} {spec.name}" for spec in op.inputs]
    arguments += [f"{_TYPES[p.annotation]} {p.name}" for p in params] + ["int keep"]
    common = ", ".join(arguments)

    def call_of(args: Sequence[Any]) -> tuple[Call, Tensor | None, Inputs]:
        weight, inputs, values, keep = args[0], tuple(args[1 : n + 1]), args[n + 1 : -1], args[-1]
        rows = inputs[0].shape[: inputs[0].dim() - op.inputs[0].features]
        constants = (tuple(v) if isinstance(v, list) else v for v in values)
        named = tuple(zip((p.name for p in params), constants, strict=True))
        return Call(op, named, keep, rows), weight, inputs

    def run(*args: Any) -> Tensor:
        call, weight, inputs = call_of(args)
        return gpu.forward(call, weight, inputs, [False] * n)[0]

    def run_backward(*args: Any) -> list[Tensor]:
        *args_of_call, dout, wanted, on_cpu = args
        call, weight, inputs = call_of(args_of_call)
        if on_cpu:
            # An operator runs below autograd, by which gradients are found there.
            key = torch._C.DispatchKey.AutogradFunctionality
            with torch._C._SetExcludeDispatchKeyGuard(key, False):
                gradients = cpu.backward(call, weight, inputs, dout, wanted, None)
        else:
            gradients = gpu.backward(call, weight, inputs, dout, wanted, None)
        return [g for g in gradients if g is not None]

    def like(*args: Any) -> Tensor:
        call, _, inputs = call_of(args)
        assert inputs[0] is not None
        return inputs[0].new_empty(call.out_shape, dtype=torch.float32)

    def gradients_like(*args: Any) -> list[Tensor]:
        inputs, wanted = args[1 : n + 1], args[-2]
        return [torch.empty_like(x) for x, want in zip(inputs, wanted, strict=True) if want]

    backward_schema = f"({common}, Tensor dout, bool[] wanted, bool on_cpu) -> Tensor[]"
    _operators[op.name] = (
        opaque(f"({common}) -> Tensor", like, name=op.name)(run),
        opaque(backward_schema, gradients_like, name=f"{op.name}_backward")(run_backward),
    )


def _values(call: Call | FusedCall) -> list[Any]:
    """Parameters in the order of the reference."""
    given = dict(call.params)
    return [given[name] for name in call.op.parameters[len(call.op.inputs) :]]
