"""Launching a row loss: strides, segments, block sizes, partial sums. One style for every kernel.

A kernel's tensors are named after its op's inputs: each is a tuple of the pointer and its strides,
as `kernels/rows.py` reads them, and None where it is not given or, like the gradient `dx` of an
input `x`, not wanted. Losses are written to `p_out`; backward has `p_dout` instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend

from .formula import Call, Inputs

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


def strided(x: Tensor | None, skipped: int = 0) -> tuple[Any, ...] | None:
    """A tensor as kernels take it: in front of its strides, but for the first `skipped`."""
    return None if x is None else (x, *x.stride()[skipped:])


def _neighbours(n_inner: int, n_segment: int) -> int:
    """How many consecutive rows share their outer index, wherever a program starts.

    At most 16, which is what Triton looks for in strides.
    """
    return math.gcd(n_inner, n_segment, 16)


def forward(
    call: Call, weight: Tensor | None, inputs: Inputs, wanted: Sequence[bool]
) -> tuple[Tensor, None]:
    """The losses, and no gradients: to write them is what costs, and backward does it once."""
    if math.prod(call.rows) == 0:
        return _first(inputs).new_zeros(call.out_shape, dtype=torch.float32), None
    out = _run(call, weight, inputs, None, [None] * len(inputs))
    assert out is not None
    return out, None


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    found: None,
) -> list[Tensor | None]:
    gradients = call.new_gradients(inputs, wanted)
    if math.prod(call.rows) > 0:
        _run(call, weight, inputs, dout.to(torch.float32).contiguous(), gradients)
    return gradients


def _run(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor | None,
    gradients: list[Tensor | None],
) -> Tensor | None:
    """Forward the losses; backward, where there is `dout`, nothing: the gradients are filled."""
    rows, first = call.rows, _first(inputs)
    assert call.op.launcher is not None
    tile: Tile = call.op.launcher(call.op.given(*inputs, **dict(call.params)))
    n_rows = math.prod(rows)
    each = call.keep == len(rows)
    n_segment = n_rows if each else math.prod(rows[call.keep :])
    n_blocks = -(-n_segment // tile.rows)
    n_programs = n_rows // n_segment * n_blocks
    tensors = {"weight": weight}
    for spec, x, gradient in zip(call.op.inputs, inputs, gradients, strict=True):
        tensors[spec.name] = x
        if spec.grad:
            tensors[f"d{spec.name}"] = gradient
    layout = _layout(rows, tensors)
    if layout is None:
        return _run_contiguous(call, weight, inputs, dout, gradients)
    n_inner, strided = layout
    is_partial = not each and n_blocks > 1
    out = None
    if dout is None:
        shape = (*call.out_shape, n_blocks) if is_partial else call.out_shape
        out = first.new_empty(shape, dtype=torch.float32)
    backend.launch(
        tile.kernel,
        (n_programs,),
        first.device,
        **strided,
        p_out=out,
        p_dout=dout,
        n_segment=n_segment,
        n_blocks=n_blocks,
        n_inner=n_inner,
        n_features=first.shape[-1],
        EACH=each,
        GROUP=0 if n_inner == n_rows else _neighbours(n_inner, n_segment),
        WIDE=n_rows >= 2**31,
        BR=tile.rows,
        **tile.constants,
    )
    return out.sum(-1) if out is not None and is_partial else out


def _run_contiguous(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor | None,
    gradients: list[Tensor | None],
) -> Tensor | None:
    """Rows in three or more dimensions that no pair of strides can walk: copy, then run."""
    copies = tuple(None if x is None else x.contiguous() for x in inputs)
    fresh = [
        None if g is None or x is None else torch.empty_like(x)
        for g, x in zip(gradients, copies, strict=True)
    ]
    out = _run(call, None if weight is None else weight.contiguous(), copies, dout, fresh)
    for g, f in zip(gradients, fresh, strict=True):
        if g is not None and f is not None:
            g.copy_(f)
    return out


def _first(inputs: Inputs) -> Tensor:
    first = inputs[0]
    assert first is not None
    return first


def _layout(
    rows: torch.Size, tensors: dict[str, Tensor | None]
) -> tuple[int, dict[str, tuple[Any, ...] | None]] | None:
    """(inner size, (tensor, outer, inner, feature strides) of each): rows in two dimensions.

    Neighbouring dimensions merge where every tensor walks both with one stride. None where more
    than two are left.
    """
    present = [x for x in tensors.values() if x is not None]
    dims: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(rows):
        # A single row keeps its strides: Triton would compile anew for others.
        if size == 1 and (dims or axis + 1 < len(rows)):
            continue
        strides = [x.stride(axis) for x in present]
        if dims and all(a == b * size for a, b in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    while len(dims) < 2:
        dims.insert(0, (1, [0] * len(present)))
    (_, outer), (n_inner, inner) = dims
    pairs = zip(outer, inner, strict=True)
    return n_inner, {
        name: None if x is None else (x, *next(pairs), *x.stride()[len(rows) :])
        for name, x in tensors.items()
    }
