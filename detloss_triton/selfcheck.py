"""Every op of the registry on this machine, both backends, against a float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend
from .engine import REGISTRY, TOLERANCE, Formula, RowOp, Sample, mapped, tensors_of

# Enough for a few programs and a partial block; quick in the interpreter.
_ROWS = 300


@dataclass(frozen=True)
class Row:
    """One line of the report: an op on a backend, its largest relative error, and the verdict."""

    op: str
    backend: str
    dtype: str
    error: float
    tolerance: float
    ok: bool


def check(device: str | torch.device = "cpu") -> Iterator[Row]:
    """Errors of every op's losses and gradients, relative to each tensor's largest value."""
    device = torch.device(device)
    backends = ["torch"] + ([] if backend.why_not_triton(device) else ["triton"])
    for name, op in sorted(REGISTRY.items()):
        for chosen in backends:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                samples = op.samples(_ROWS, torch.Generator().manual_seed(0))
                error = max(_error(op, sample, chosen, dtype, device) for sample in samples)
                tolerance = TOLERANCE[dtype]
                label = str(dtype).removeprefix("torch.")
                yield Row(name, chosen, label, error, tolerance, error <= tolerance)


def _error(
    op: Formula, sample: Sample, chosen: Any, dtype: torch.dtype, device: torch.device
) -> float:
    rounded = mapped(lambda x: _cast(x, dtype), sample.inputs)
    with backend.use_backend("torch"):
        truth = results(op, sample, mapped(lambda x: _cast(x, torch.float64), rounded))
    with backend.use_backend(chosen):
        ours = results(op, sample, mapped(lambda x: x.to(device), rounded))
    return max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def results(op: Formula, sample: Sample, inputs: tuple[Any, ...]) -> list[Tensor]:
    """An op's outputs and, where it has gradients, those of their randomly weighted sum."""
    given, leaves = op.with_leaves(Sample(inputs, sample.params, sample.weight))
    of_rows = {}
    if isinstance(op, RowOp):
        first = tensors_of(inputs)[0]
        weight = None if sample.weight is None else sample.weight.to(first.device)
        of_rows = {"weight": weight, "keep": first.dim() - op.inputs[0].features}
    assert callable(op)
    out = op(*given.inputs, **of_rows, **sample.params)
    if not leaves:
        return list(out) if isinstance(out, tuple) else [out]
    upstream = torch.rand(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, leaves, upstream.to(out))
    return [out.detach(), *gradients]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value; infinite where only one of them is finite."""
    if truth.numel() == 0:
        return 0.0
    ours, truth = ours.double().cpu(), truth.double().cpu()
    if not torch.equal(ours.isfinite(), truth.isfinite()):
        return float("inf")
    ours, truth = ours.nan_to_num(), truth.nan_to_num()
    return float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-6))
