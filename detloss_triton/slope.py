"""Values that bring their derivative along, where autograd's takes more passes or rounds worse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend


def with_slope(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """`value`, with `slope` as its derivative by x, once. Neither may require a gradient itself.

    Shapes:
        slope: as x. value, and what is returned: as x, or without the last dimension, summed.
    """
    if torch.compiler.is_compiling() or backend.is_transformed():
        # `torch.func`, which the graph calls too, refuses such a Function. The term added here is 0
        # and has the slope.
        tangent = slope * (x - x.detach())
        return value + (tangent if value.dim() == x.dim() else tangent.sum(-1))
    out: Tensor = _WithSlope.apply(x, value, slope)
    return out


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph must be False: a slope that was given has none itself")
        (slope,) = ctx.saved_tensors
        return slope * dout[(..., *[None] * (slope.dim() - dout.dim()))], None, None
