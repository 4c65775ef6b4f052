"""Values that bring their derivative along, where autograd's takes more passes or rounds worse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_slope(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """`value`, which a derivative by x connects to it; value and slope are without gradient.

    Shapes:
        slope: as x. value, and what is returned: as x, or without the last dimension, summed.
    """
    if torch.compiler.is_compiling():
        # The graph calls `torch.func.vjp`, which by itself refuses such a Function; Dynamo of torch
        # 2.13 traces it all the same. This needs no leave: it is 0, and has the slope.
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
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * dout[(..., *[None] * (slope.dim() - dout.dim()))], None, None
