"""Ops on a CPU: in blocks of rows that stay in its caches, and only rows that count.

A loss over 10^7 logits is dominated by its temporaries: each is a pass through memory and its page
faults. Those of a block live in the cache. Autograd differentiates a block while it is there, so
that gradients of summed losses are found in forward, and backward only scales them.

To look which rows count costs nothing where the host is the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detloss_triton.precision import are_half, arithmetic_dtype

from . import zeros
from .formula import TEMPORARIES, Call, Inputs

# Elements of all temporaries of a block, which stay in cache together. Smaller blocks would spend
# their time on the fixed cost of some 0.2 ms of small operations.
ELEMENTS = 2**22

# Elements of all temporaries of an op from which on it pays to cut it into blocks.
MANY = 2**20

Gradients = list[Tensor | None]
Rows = tuple[Tensor, ...]
_Index = tuple[int | slice, ...]


def pays(call: Call, inputs: Inputs) -> bool:
    """Whether evaluation here takes less time than that of the reference as it stands."""
    return max(x.numel() for x in inputs if x is not None) * call.op.temporaries > MANY


@dataclass
class Found:
    """Gradients of the losses' sum, which forward finds: of all rows, or of a few at an index."""

    gradients: Gradients
    rows: Rows | None


def forward(
    call: Call, weight: Tensor | None, inputs: Inputs, wanted: Sequence[bool]
) -> tuple[Tensor, Found | None]:
    """The losses; and the gradients of their sum, for backward to scale, where that pays."""
    rows = _few_that_count(call, weight, None)
    at_once = any(wanted) and found_in_forward(call, inputs, rows)
    losses, gradients = _evaluate(
        call, weight, inputs, wanted if at_once else [False] * len(inputs), None, rows
    )
    return losses, Found(gradients, rows) if at_once else None


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    found: Found | None,
) -> Gradients:
    """The gradients. Those that forward found are used up."""
    if found is None and found_in_forward(call, inputs, _few_that_count(call, weight, None)):
        _, found = forward(call, weight, inputs, wanted)
    if found is not None:
        rows, gradients = found.rows, found.gradients
        if not (dout == 1).all():
            scale = dout if rows is None or not call.keep else dout[rows[: call.keep]]
            for gradient in gradients:
                if gradient is not None:
                    gradient *= scale[(..., *[None] * (gradient.dim() - scale.dim()))]
    else:
        summed = (..., *[None] * (len(call.rows) - call.keep))
        upstream = dout if call.op.values else dout[summed].expand(call.rows)
        rows = _few_that_count(call, weight, upstream)
        _, gradients = _evaluate(call, weight, inputs, wanted, upstream, rows)
    return gradients if rows is None else _spread(inputs, rows, gradients)


def _spread(inputs: Inputs, rows: Rows, gradients: Gradients) -> Gradients:
    """Gradients by all rows, of those by a few."""
    spread: Gradients = [
        None if x is None or gradient is None else zeros.zeros_like(x)
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
    _write(spread, rows, gradients)
    return spread


def _write(into: Gradients, rows: Rows, gradients: Gradients) -> None:
    for x, gradient in zip(into, gradients, strict=True):
        if x is not None and gradient is not None:
            x[rows] = gradient


def found_in_forward(call: Call, inputs: Inputs, rows: Rows | None = None) -> bool:
    """Whether gradients are found with the losses, and scaled by the upstream gradient later.

    Of losses that are summed every row will be asked for its gradient, or those `rows` alone that
    count. A loss of each row may be asked for few rows only; and half precision has to see the
    upstream gradient before it rounds.
    """
    is_asked = call.is_summed or rows is not None
    return is_asked and not call.op.values and not are_half(*inputs)


def slices(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows, each with temporaries of `width` elements, that stay in cache."""
    step = max(ELEMENTS // max(width * TEMPORARIES, 1), 1)
    for start in range(0, n, step):
        yield slice(start, start + step)


def _blocks(call: Call, inputs: Inputs) -> Iterator[_Index]:
    """Indices that cut the rows into blocks: whole trailing dimensions of a slice of one."""
    rows = call.rows
    if rows.numel() == 0:
        return
    most = ELEMENTS // call.op.temporaries
    width = max(x.numel() for x in inputs if x is not None) // rows.numel()
    axis = len(rows) - 1
    while axis > 0 and width * rows[axis] <= most:
        width *= rows[axis]
        axis -= 1
    n_blocks = math.ceil(rows[axis] / max(most // width, 1))
    step = math.ceil(rows[axis] / n_blocks)
    for outer in itertools.product(*(range(n) for n in rows[:axis])):
        for start in range(0, rows[axis], step):
            yield *outer, slice(start, start + step)


def _evaluate(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    rows: Rows | None,
) -> tuple[Tensor, Gradients]:
    """The losses, unless there is an upstream gradient of rows; and the gradients wanted, of all
    rows or of a few."""
    if rows is not None:
        return _of_few(call, weight, inputs, wanted, upstream, rows)
    gradients = call.new_gradients(inputs, wanted)
    of_class = _rows_of_class(call, inputs)
    losses = _by_block(call, weight, inputs, gradients, upstream, of_class)
    if of_class is not None:
        # In full: to take an entry of background back would leave the rounding error of what
        # cancels.
        rows = of_class.nonzero(as_tuple=True)
        others, some = _of_few(call, weight, inputs, wanted, upstream, rows)
        losses = losses + others
        _write(gradients, rows, some)
    return losses, gradients


def _rows_of_class(call: Call, inputs: Inputs) -> Tensor | None:
    """Mask of the rows that have a class, if most have none and there is a short way for those."""
    named = dict(zip((spec.name for spec in call.op.inputs), inputs, strict=True))
    label, logits = named.get("label"), inputs[0]
    if call.op.background is None or label is None or logits is None:
        return None
    of_class = (label >= 0) & (label < logits.shape[-1])
    return of_class if 2 * int(of_class.sum()) < label.numel() else None


def _few_that_count(call: Call, weight: Tensor | None, upstream: Tensor | None) -> Rows | None:
    """Where the rows are that have a weight and an upstream gradient, if most have not."""
    counts = None
    if call.op.skip and weight is not None:
        counts = weight.bool()
    if upstream is not None:
        asked = upstream.bool().any(-1) if call.op.values else upstream.bool()
        counts = asked if counts is None else counts & asked
    if counts is None or 2 * int(counts.sum()) >= counts.numel():
        return None
    return counts.nonzero(as_tuple=True)


def _of_few(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    rows: Rows,
) -> tuple[Tensor, Gradients]:
    """What a few rows add to the losses; and their gradients."""
    weight, upstream, *picked = (
        None if x is None else x[rows] for x in (weight, upstream, *inputs)
    )
    part = replace(call, keep=1, rows=rows[0].shape)
    gradients = part.new_gradients(tuple(picked), wanted)
    losses = _by_block(part, weight, tuple(picked), gradients, upstream)
    each = losses.new_zeros((*call.rows, *losses.shape[1:]))
    each[rows] = losses
    return each.flatten(call.keep).sum(-1) if call.is_summed else each, gradients


def _by_block(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    gradients: Gradients,
    upstream: Tensor | None,
    left_out: Tensor | None = None,
) -> Tensor:
    """As `_evaluate`, of all rows in blocks; with a mask of rows that are left out, the others as
    background.
    """
    out = torch.zeros(call.out_shape, dtype=arithmetic_dtype(*inputs))
    for index in _blocks(call, inputs):
        above, without, *block = (
            None if x is None else x[index].detach() for x in (upstream, left_out, *inputs)
        )
        factor = None if weight is None else weight[index].to(out.dtype)
        into = [None if g is None else g[index] for g in gradients]
        if without is None:
            losses = _differentiated(call, factor, above, tuple(block), into)
        else:
            losses = _background(call, factor, above, tuple(block), into)
            losses = losses.masked_fill(without, 0)
        if upstream is None:
            cell = out[index[: call.keep]]
            cell += losses if cell.dim() == losses.dim() else losses.flatten(cell.dim()).sum(-1)
    return out


def _differentiated(
    call: Call, weight: Tensor | None, upstream: Tensor | None, inputs: Inputs, into: Gradients
) -> Tensor:
    """The weighted losses of some rows; their gradients, by autograd, are written."""
    leaves = [
        x if g is None or x is None else x.requires_grad_()
        for x, g in zip(inputs, into, strict=True)
    ]
    by = [x for x, g in zip(leaves, into, strict=True) if x is not None and g is not None]
    with torch.set_grad_enabled(bool(by)):
        losses = call.each(*leaves)
        if weight is not None:
            losses = losses * (weight.unsqueeze(-1) if call.op.values else weight)
    unused = None
    if weight is not None and call.op.skip and not weight.all():
        unused = weight == 0
    if by:
        above = torch.ones_like(losses) if upstream is None else upstream.to(losses.dtype)
        found = iter(torch.autograd.grad(losses, by, above))
        for gradient in into:
            if gradient is not None:
                gradient.copy_(next(found))
                if unused is not None:
                    gradient[unused] = 0
    losses = losses.detach()
    if unused is None:
        return losses
    return losses.masked_fill(unused.unsqueeze(-1) if call.op.values else unused, 0)


def _background(
    call: Call, weight: Tensor | None, upstream: Tensor | None, inputs: Inputs, into: Gradients
) -> Tensor:
    """The weighted losses of rows without a class; their gradients are written."""
    logits, _, _, mask = inputs
    assert call.op.background is not None and logits is not None
    entries, slopes = call.op.background(
        logits.to(arithmetic_dtype(*inputs)), mask, **dict(call.params)
    )
    losses = entries.sum(-1)
    if into[0] is not None:
        scale = weight if upstream is None else upstream if weight is None else weight * upstream
        into[0].copy_(slopes if scale is None else slopes.mul_(scale.unsqueeze(-1)))
    return losses if weight is None else losses * weight
