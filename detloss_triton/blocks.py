"""Evaluation of a torch reference in blocks of rows that stay in the CPU's caches.

On a CPU a loss over 10^7 logits is dominated by its temporaries: every one is a pass through memory
and its page faults. A block's temporaries live in the cache, and there is one block at a time.
Backward recomputes each block under autograd and writes its slice of the gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend

if TYPE_CHECKING:
    from .op import Call

# Elements of a block's widest input: a few such tensors stay in cache, and the fixed cost of a
# block, some 0.3 ms of small operations, stays small beside its arithmetic.
ELEMENTS = 2**19

_Index = tuple[int | slice, ...]


def pays(call: Call, inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether the call is worth cutting: eager, on the CPU, and more than one block long."""
    if torch.compiler.is_compiling() or not call.op.cut or not call.rows:
        return False
    widest = max(x.numel() for x in inputs if x is not None)
    device = next(x.device for x in inputs if x is not None)
    return widest > ELEMENTS and backend.is_cached_by_cpu(device)


def _indices(call: Call, inputs: tuple[Tensor | None, ...]) -> Iterator[_Index]:
    """Indices that cut the rows into blocks: whole trailing dimensions of a slice of one."""
    rows = call.rows
    width = max(x[(0,) * len(rows)].numel() for x in inputs if x is not None)
    axis = len(rows) - 1
    while axis > 0 and width * rows[axis] <= ELEMENTS:
        width *= rows[axis]
        axis -= 1
    n_blocks = math.ceil(rows[axis] * width / ELEMENTS)
    step = math.ceil(rows[axis] / n_blocks)
    for outer in itertools.product(*(range(n) for n in rows[:axis])):
        for start in range(0, rows[axis], step):
            yield *outer, slice(start, start + step)


def slices(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of n rows of `width` elements that stay in cache; one where cutting is no gain."""
    whole = torch.compiler.is_compiling() or not backend.is_cached_by_cpu(device)
    step = n if whole else max(ELEMENTS // max(width, 1), 1)
    for start in range(0, n, max(step, 1)):
        yield slice(start, min(start + step, n))


def _at(index: _Index, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x[index] for x in tensors]


def forward(call: Call, weight: Tensor | None, inputs: tuple[Tensor | None, ...]) -> Tensor:
    out: Tensor | None = None
    with torch.no_grad():
        for index in _indices(call, inputs):
            losses = call.losses(*_at(index, weight, *inputs))
            if out is None:
                out = losses.new_zeros(call.out_shape)
            cell = out[index[: call.keep]]
            cell += losses if cell.dim() == losses.dim() else losses.flatten(cell.dim()).sum(-1)
    assert out is not None
    return out


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    dout: Tensor,
    gradients: list[Tensor | None],
) -> None:
    """Write the gradients, which are uninitialised; None is not wanted."""
    for index in _indices(call, inputs):
        block = [None if x is None else x[index].detach() for x in inputs]
        leaves = [
            x.requires_grad_()
            for x, g in zip(block, gradients, strict=True)
            if x is not None and g is not None
        ]
        with torch.enable_grad():
            losses = call.losses(None if weight is None else weight[index], *block)
        upstream = dout[index[: call.keep]]
        upstream = upstream[(..., *[None] * (losses.dim() - upstream.dim()))].expand_as(losses)
        results = iter(torch.autograd.grad(losses, leaves, upstream))
        for g in gradients:
            if g is not None:
                g[index] = next(results)
