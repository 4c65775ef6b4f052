"""Evaluation of a torch reference inside a compiled graph on a CPU: by what Inductor fuses.

The reference is one expression over all rows. Losses that are summed find their gradient in
forward: one loop over the logits instead of two, and backward scales what it finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import blocks
from .opaque import opaque

if TYPE_CHECKING:
    from .op import Call

_Inputs = tuple[Tensor | None, ...]


def evaluate(call: Call, weight: Tensor | None, inputs: _Inputs) -> Tensor:
    """The losses, differentiable by the inputs that require it."""
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    out: Tensor
    if differentiated and call.few:
        out = _Few.apply(call, weight, *inputs)
    elif differentiated and blocks.in_forward(call, inputs):
        out = _InForward.apply(call, weight, *inputs)
    else:
        out = call.whole(weight, *inputs)
    return out


class _InForward(torch.autograd.Function):
    """Saves the gradient of the sum, in the order of the input's memory."""

    @staticmethod
    def forward(ctx: Any, call: Call, weight: Tensor | None, *inputs: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[2:]

        def losses(*leaves: Tensor) -> Tensor:
            given = iter(leaves)
            return call.whole(
                weight, *(next(given) if w else x for x, w in zip(inputs, wanted, strict=True))
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


class _Few(torch.autograd.Function):
    """Leaves the gradient of few rows to `blocks`, which look for them."""

    @staticmethod
    def forward(ctx: Any, call: Call, weight: Tensor | None, *inputs: Tensor | None) -> Tensor:
        ctx.call, ctx.wanted = call, ctx.needs_input_grad[2:]
        ctx.save_for_backward(weight, *inputs)
        return call.whole(weight, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        call = ctx.call
        gradients = iter(_row_gradients(call.op.name, weight, inputs, dout, list(ctx.wanted)))
        return None, None, *(next(gradients) if w else None for w in ctx.wanted)


@opaque(
    "(str op, Tensor? weight, Tensor?[] inputs, Tensor dout, bool[] wanted) -> Tensor[]",
    lambda op, weight, inputs, dout, wanted: [
        torch.empty_like(x) for x, w in zip(inputs, wanted, strict=True) if w
    ],
)
def _row_gradients(
    op: str,
    weight: Tensor | None,
    inputs: list[Tensor | None],
    dout: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients by the inputs wanted of an op without parameters that keeps all rows."""
    from .op import REGISTRY, Call, RowOp

    row_op = REGISTRY[op]
    assert isinstance(row_op, RowOp)
    call = Call(row_op, (), dout.dim(), dout.shape, few=True)
    # An operator runs below autograd, of which blocks make use.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        found = blocks.backward(call, weight, tuple(inputs), dout, wanted, None)
    return [g for g in found if g is not None]
