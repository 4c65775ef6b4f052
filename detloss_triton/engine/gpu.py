"""Launching a row loss: strides, segments, block sizes, partial sums. One style for every kernel.

A kernel's arguments are named after its op's inputs: pointers `p_x`, gradients `p_dx`, strides of
the outer row, inner row and feature dimension `s_x_o`, `s_x_i`, `s_x_f`, flags `HAS_X`, `GRAD_X`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend

from .formula import Call, Input

# Elements a program holds at a time, per input: with 4 warps, 8 in each lane. Twice as many would
# take 230 registers in the focal loss and leave room for two programs on a multiprocessor.
TILE = 1024


@dataclass(frozen=True)
class Tile:
    """What a launcher answers: the kernel, the rows each program takes, and its own constants."""

    kernel: Any
    rows: int
    constants: dict[str, Any] = field(default_factory=dict)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _neighbours(n_inner: int, n_segment: int) -> int:
    """How many consecutive rows share their outer index, wherever a program starts.

    At most 16, which Triton looks for in strides. By remainders: a gcd would fix dynamic shapes.
    """
    return next(n for n in (16, 8, 4, 2, 1) if n_inner % n == 0 and n_segment % n == 0)


def forward(
    call: Call, weight: Tensor | None, inputs: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor, None]:
    """The losses, and no gradients: to write them is what costs, and backward does it once."""
    if math.prod(call.rows) == 0:
        return _first(inputs).new_zeros(call.out_shape, dtype=torch.float32), None
    return _run(call, weight, inputs, None, [None] * len(inputs)), None


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    dout: Tensor,
    wanted: Sequence[bool],
    ready: None,
) -> list[Tensor | None]:
    gradients = call.new_gradients(inputs, wanted)
    if math.prod(call.rows) > 0:
        _run(call, weight, inputs, dout.to(torch.float32).contiguous(), gradients)
    return gradients


def _run(
    call: Call,
    weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    dout: Tensor | None,
    gradients: list[Tensor | None],
) -> Tensor:
    specs, rows = call.op.inputs, call.rows
    assert call.op.launcher is not None
    tile: Tile = call.op.launcher(*inputs, **dict(call.params))
    n_rows = math.prod(rows)
    each = call.keep == len(rows)
    n_segment = n_rows if each else math.prod(rows[call.keep :])
    n_blocks = -(-n_segment // tile.rows)
    n_programs = n_rows // n_segment * n_blocks
    first = _first(inputs)
    is_partial = not each and n_blocks > 1
    out = dout
    if out is None:
        shape = (*call.out_shape, n_blocks) if is_partial else call.out_shape
        out = first.new_empty(shape, dtype=torch.float32)

    named: dict[str, Tensor | None] = {"weight": weight}
    for spec, x, gradient in zip(specs, inputs, gradients, strict=True):
        named[spec.name] = x
        if spec.grad:
            named[f"d{spec.name}"] = gradient
    layout = _layout(rows, [x for x in named.values() if x is not None])
    if layout is None:
        return _run_contiguous(call, weight, inputs, dout, gradients)
    n_inner, strides = layout
    backend.launch(
        tile.kernel,
        (n_programs,),
        first.device,
        **_arguments(specs, named, strides, first),
        # A kernel uses one of the two: `BACKWARD` says which.
        p_out=out,
        p_dout=out,
        n_segment=n_segment,
        n_blocks=n_blocks,
        n_inner=n_inner,
        n_features=first.shape[-1],
        BACKWARD=dout is not None,
        EACH=each,
        GROUP=0 if n_inner == n_rows else _neighbours(n_inner, n_segment),
        WIDE=n_rows >= 2**31,
        BR=tile.rows,
        **tile.constants,
    )
    return out.sum(-1) if dout is None and is_partial else out


def _arguments(
    specs: Sequence[Input],
    named: dict[str, Tensor | None],
    strides: Iterable[tuple[int, int]],
    missing: Tensor,
) -> dict[str, Any]:
    """Pointers, strides and flags of the tensors; `missing` stands in for None, and is not read."""
    present = iter(strides)
    featured = {s.name for s in specs if s.features} | {f"d{s.name}" for s in specs if s.features}
    arguments: dict[str, Any] = {"HAS_WEIGHT": named["weight"] is not None}
    for name, x in named.items():
        outer, inner = next(present) if x is not None else (0, 0)
        arguments[f"p_{name}"] = missing if x is None else x
        arguments[f"s_{name}_o"] = outer
        arguments[f"s_{name}_i"] = inner
        if name in featured:
            arguments[f"s_{name}_f"] = 0 if x is None else x.stride(-1)
    for spec in specs:
        if spec.optional:
            arguments[f"HAS_{spec.name.upper()}"] = named[spec.name] is not None
    differentiable = [spec.name for spec in specs if spec.grad]
    if len(differentiable) > 1:
        for name in differentiable:
            arguments[f"GRAD_{name.upper()}"] = named[f"d{name}"] is not None
    return arguments


def _run_contiguous(
    call: Call,
    weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    dout: Tensor | None,
    gradients: list[Tensor | None],
) -> Tensor:
    """Rows in three or more dimensions that no pair of strides can walk: copy, then run."""
    copies = [None if x is None else x.contiguous() for x in inputs]
    fresh = [
        None if g is None or x is None else torch.empty_like(x)
        for g, x in zip(gradients, copies, strict=True)
    ]
    weight = None if weight is None else weight.contiguous()
    out = _run(call, weight, tuple(copies), dout, fresh)
    for g, f in zip(gradients, fresh, strict=True):
        if g is not None and f is not None:
            g.copy_(f)
    return out


def _first(inputs: tuple[Tensor | None, ...]) -> Tensor:
    first = inputs[0]
    assert first is not None
    return first


def _layout(rows: torch.Size, tensors: list[Tensor]) -> tuple[int, list[tuple[int, int]]] | None:
    """(inner size, (outer, inner) strides of each tensor): the rows as two dimensions, or None.

    Neighbouring dimensions merge where every tensor walks both with one stride.
    """
    dims: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(rows):
        strides = [x.stride(axis) for x in tensors]
        if size == 1:
            continue
        if dims and all(a == b * size for a, b in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    while len(dims) < 2:
        dims.insert(0, (1, [0] * len(tensors)))
    return dims[1][0], list(zip(dims[0][1], dims[1][1], strict=True))
