"""Ops inside a graph compiled for a CPU: by what Inductor fuses.

The reference is one expression over all rows. Losses that are summed find their gradient in
forward: one loop over the logits instead of two, and backward scales what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, graph
from .formula import Call, Inputs, is_differentiated
from .operators import opaque


def forward(
    call: Call, weight: Tensor | None, inputs: Inputs, wanted: Sequence[bool]
) -> tuple[Tensor, None]:
    """The losses of all rows, of which backward may be asked for few."""
    return call.whole(weight, *_with_labels(call, inputs), in_one_loop=True), None


def backward(
    call: Call,
    weight: Tensor | None,
    inputs: Inputs,
    dout: Tensor,
    wanted: Sequence[bool],
    found: None,
) -> list[Tensor | None]:
    """The gradients, by an operator that looks for the rows which are asked for."""
    return graph.backward_on_cpu(call, weight, inputs, dout, wanted)


def evaluate(call: Call, weight: Tensor | None, inputs: Inputs) -> Tensor:
    """The losses, differentiable by the inputs that require it."""
    inputs = _with_labels(call, inputs)
    if is_differentiated(inputs) and cpu.found_in_forward(call, inputs):
        out: Tensor = _InForward.apply(call, weight, *inputs)
        return out
    return call.whole(weight, *inputs, in_one_loop=True)


def _with_labels(call: Call, inputs: Inputs) -> Inputs:
    """Labels are computed once, and not again for each class that they are compared with."""
    return tuple(
        computed_once(x) if x is not None and spec.index else x
        for spec, x in zip(call.op.inputs, inputs, strict=True)
    )


@opaque("(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def computed_once(x: Tensor) -> Tensor:
    """A copy that Inductor makes, instead of computing x wherever it is used."""
    return x.clone(memory_format=torch.contiguous_format)


class _InForward(torch.autograd.Function):
    """Saves the gradient of the sum, in the order of the input's memory."""

    @staticmethod
    def forward(ctx: Any, call: Call, weight: Tensor | None, *inputs: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[2:]

        def losses(*leaves: Tensor) -> Tensor:
            given = iter(leaves)
            return call.whole(
                weight,
                *(next(given) if w else x for x, w in zip(inputs, wanted, strict=True)),
                in_one_loop=True,
            )

        leaves = [x for x, w in zip(inputs, wanted, strict=True) if w and x is not None]
        out: Tensor
        out, pull, *_ = torch.func.vjp(losses, *(x.detach() for x in leaves))
        gradients = pull(torch.ones_like(out))
        # The copy has the strides of the input, and Inductor neither drops nor repeats it.
        ctx.save_for_backward(
            *(torch.empty_like(x).copy_(g) for x, g in zip(leaves, gradients, strict=True))
        )
        ctx.orders = [_order(x) for x in leaves]
        ctx.wanted = wanted
        ctx.summed = len(call.rows) - call.keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        upstream = dout[(..., *[None] * ctx.summed)]
        scaled = (
            _scaled(g, upstream[(..., *[None] * (g.dim() - upstream.dim()))], order)
            for g, order in zip(ctx.saved_tensors, ctx.orders, strict=True)
        )
        return None, None, *(next(scaled) if w else None for w in ctx.wanted)


def _order(x: Tensor) -> list[int]:
    """Dimensions of x, outermost in memory first. Dynamo sorts no symbols, but compares them."""
    order: list[int] = []
    for d in range(x.dim()):
        order.insert(len([e for e in order if x.stride(e) >= x.stride(d)]), d)
    return order


def _scaled(gradient: Tensor, upstream: Tensor, order: list[int]) -> Tensor:
    """Their product, computed along memory: otherwise Inductor would transpose it and back."""
    product = gradient.permute(order) * upstream.permute(order)
    return product.permute([order.index(d) for d in range(len(order))])
