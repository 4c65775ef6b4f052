"""Evaluation of a torch reference on a CPU: in blocks of rows that stay in its caches.

On a CPU a loss over 10^7 logits is dominated by its temporaries: every one is a pass through memory
and its page faults. A block's temporaries live in the cache, and there is one block at a time.
Autograd differentiates each block, in forward where it can, and writes its slice of the gradient.

Rows that have nothing to say are not evaluated: a count costs no synchronisation where the host is
the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backend, memory
from .entries import At, factor, where

if TYPE_CHECKING:
    from .op import Call

# Elements of all temporaries of a block, which stay in cache together. Smaller blocks would spend
# their time on the fixed cost of some 0.2 ms of small operations.
ELEMENTS = 2**22

# Rows from which on looking for those of weight zero costs less than their evaluation.
FEW = 2**13

# Temporaries of most formulas, each as large as the widest input.
TEMPORARIES = 16

_Inputs = tuple[Tensor | None, ...]
Gradients = list[Tensor | None]
_Index = tuple[int | slice, ...]


class Part(NamedTuple):
    """Some rows of a call, evaluated with one set of inputs; a call is the sum of its parts.

    `at` says which rows of the call they are, None is all in order; their gradients replace those
    of a part before. The losses of rows that are `left` to another part do not count.
    """

    inputs: _Inputs
    weight: Tensor | None
    at: At | None = None
    left: Tensor | None = None


def everything(weight: Tensor | None, *inputs: Tensor | None) -> list[Part]:
    return [Part(inputs, weight)]


def pays(call: Call, weight: Tensor | None, inputs: _Inputs) -> bool:
    """Whether it pays to cut the call into blocks, or to look for rows that count: in eager mode
    on a CPU, with more than one block, or with more than `FEW` rows that may be skipped.
    """
    device = next(x.device for x in inputs if x is not None)
    if not call.rows or not backend.is_eager_cpu(device):
        return False
    if call.op.skip and weight is not None and weight.numel() > FEW:
        return True
    return max(x.numel() for x in inputs if x is not None) > ELEMENTS // call.op.temporaries


def _indices(rows: torch.Size, inputs: _Inputs, temporaries: int) -> Iterator[_Index]:
    """Indices that cut the rows into blocks: whole trailing dimensions of a slice of one."""
    elements = ELEMENTS // temporaries
    if rows.numel() == 0:
        return
    width = max(x.numel() for x in inputs if x is not None) // rows.numel()
    axis = len(rows) - 1
    while axis > 0 and width * rows[axis] <= elements:
        width *= rows[axis]
        axis -= 1
    n_blocks = math.ceil(rows[axis] / max(elements // width, 1))
    step = math.ceil(rows[axis] / n_blocks)
    for outer in itertools.product(*(range(n) for n in rows[:axis])):
        for start in range(0, rows[axis], step):
            yield *outer, slice(start, start + step)


def slices(
    n: int, width: int, device: torch.device, temporaries: int = TEMPORARIES
) -> Iterator[slice]:
    """Slices of n rows, with temporaries of `width` elements each, that stay in cache; one where
    cutting is no gain.
    """
    if not backend.is_eager_cpu(device):
        # Without a loop over n, which would make it a constant of the compiled graph.
        yield slice(None)
        return
    step = max(ELEMENTS // max(width * temporaries, 1), 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _few(part: Part, live: Tensor) -> Part:
    """Of a part of all rows only the live ones, where they are few."""
    if 2 * np.count_nonzero(live.numpy()) > live.numel():
        return part
    at = where(live)
    weight, *inputs = (None if x is None else at.of(x) for x in (part.weight, *part.inputs))
    return Part(tuple(inputs), weight, at)


class Ready(NamedTuple):
    """Gradients by the inputs wanted, of all rows; or of those at an index, the others being 0."""

    gradients: Gradients
    at: At | None


def forward(
    call: Call, weight: Tensor | None, inputs: _Inputs, wanted: Sequence[bool]
) -> tuple[Tensor, Ready | None]:
    """The losses; and where they are found `in_forward`, the gradients of their sum."""
    parts = _parts(call, weight, inputs)
    first = parts[0]
    if not any(wanted) or not in_forward(call, inputs, few=first.at is not None):
        return _run(call, parts, None), None
    if first.at is not None:
        losses, some = _picked(call, first, first.at, wanted, None)
        return losses, Ready(some, first.at)
    gradients = memory.wanted_like(memory.empty_like, inputs, wanted)
    return _run(call, parts, gradients), Ready(gradients, None)


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: _Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    ready: Ready | None,
) -> Gradients:
    """The gradients. `ready` are those that forward found: they are used up."""
    if ready is None:
        parts = _parts(call, weight, inputs)
        if in_forward(call, inputs, few=parts[0].at is not None):
            ready = forward(call, weight, inputs, wanted)[1]
    if ready is not None:
        return _scaled(call, inputs, dout, ready)
    upstream = dout
    if not call.op.values:
        upstream = dout[(..., *[None] * (len(call.rows) - call.keep))].expand(call.rows)
    if parts[0].at is None:
        # A cast takes a fifth of the time of a comparison.
        live = upstream.bool().any(-1) if call.op.values else upstream.bool()
        few = _few(Part(inputs, weight), live if weight is None else live & weight.bool())
        parts = parts if few.at is None else [few]
    new = memory.empty_like if parts[0].at is None else memory.zeros_like
    gradients = memory.wanted_like(new, inputs, wanted)
    _run(call, parts, gradients, upstream)
    return gradients


def _scaled(call: Call, inputs: _Inputs, dout: Tensor, ready: Ready) -> Gradients:
    """The gradients found in forward, times the upstream gradient."""
    scale = factor(dout)
    if ready.at is not None and scale is not None and call.keep > 0:
        scale = ready.at.rows(call.keep).of(scale)
    for g in ready.gradients:
        if g is not None and scale is not None:
            g *= scale[(..., *[None] * (g.dim() - scale.dim()))]
    if ready.at is None:
        return ready.gradients
    wanted = [g is not None for g in ready.gradients]
    gradients = memory.wanted_like(memory.zeros_like, inputs, wanted)
    _put(gradients, ready.at, ready.gradients)
    return gradients


def _put(gradients: Gradients, at: At, some: Gradients) -> None:
    """Write gradients of the rows at an index."""
    for g, values in zip(gradients, some, strict=True):
        if g is not None and values is not None:
            at.put(g, values)


def _parts(call: Call, weight: Tensor | None, inputs: _Inputs) -> list[Part]:
    if call.op.skip and weight is not None:
        return [_few(Part(inputs, weight), weight.bool())]
    return call.op.parts(weight, *inputs)


def in_forward(call: Call, inputs: _Inputs, few: bool = False) -> bool:
    """Whether the gradient is computed in forward, and scaled by the upstream gradient later.

    Of losses that are summed every row will be asked for its gradient, and finding it at once saves
    evaluating the row again. A loss per row may be asked for few rows only, unless `few` have a
    loss at all; and half precision has to see the upstream gradient before it rounds.
    """
    half = any(x is not None and x.dtype in (torch.float16, torch.bfloat16) for x in inputs)
    return (call.keep < len(call.rows) or (few and not call.op.values)) and not half


def _run(
    call: Call, parts: list[Part], gradients: Gradients | None, upstream: Tensor | None = None
) -> Tensor:
    """The losses of the parts. Their gradients are written to `gradients`; None is not wanted.

    `upstream` is the upstream gradient of each row, 1 if None; with one, nobody asks for losses.
    """
    found: list[Tensor] = []
    wanted = [g is not None for g in gradients or []]
    for part in parts:
        if part.at is not None:
            losses, some = _picked(call, part, part.at, wanted, upstream)
            _put(gradients or [], part.at, some)
        else:
            losses = _cut(call, part, gradients, upstream)
            if gradients and call.op.skip and part.weight is not None:
                skipped = where(~part.weight.bool()).by_dimension
                for g in gradients:
                    if g is not None:
                        g[skipped] = 0
        found.append(losses)
    return sum(found[1:], found[0])


def _picked(
    call: Call,
    part: Part,
    at: At,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """What a part of some rows adds to the losses, if asked, and the gradients by its inputs."""
    some = memory.wanted_like(torch.empty_like, part.inputs, wanted) if any(wanted) else []
    picked = replace(call, keep=1, rows=at.flat.shape)
    losses = _cut(picked, part, some, None if upstream is None else at.of(upstream))
    if call.keep == 0 or upstream is not None:
        return losses.sum(), some
    # Summed from a tensor of all rows: adding at an index is not repeatable with threads.
    each = losses.new_zeros((*call.rows, *losses.shape[1:]))
    at.put(each, losses)
    return call.summed(each), some


def _cut(call: Call, part: Part, gradients: Gradients | None, upstream: Tensor | None) -> Tensor:
    """The losses of all rows of a part, and their gradients, block by block."""
    inputs, weight = part.inputs, part.weight
    # Losses that are not summed can be weighed together.
    late = gradients is None and call.keep == len(call.rows)
    out = torch.zeros(call.out_shape, dtype=call.dtype(inputs), device="cpu")
    one = out.new_ones(())
    for index in _indices(call.rows, inputs, call.op.temporaries):
        block = [None if x is None else x[index].detach() for x in inputs]
        leaves = [
            x.requires_grad_()
            for x, g in zip(block, gradients or [], strict=False)
            if x is not None and g is not None
        ]
        with torch.set_grad_enabled(bool(leaves)):
            here = None if late or weight is None else weight[index]
            losses = call.losses(here, *block, blank=False)
        if leaves:
            above = one.expand_as(losses) if upstream is None else upstream[index]
            results = iter(torch.autograd.grad(losses, leaves, above))
            for g in gradients or []:
                if g is not None:
                    g[index] = next(results)
        cell = out[index[: call.keep]]
        losses = losses.detach()
        if part.left is not None:
            losses = torch.where(part.left[index], 0, losses)
        cell += losses if cell.dim() == losses.dim() else losses.flatten(cell.dim()).sum(-1)
    return call.weighed(out, weight, blank=False) if late else out
