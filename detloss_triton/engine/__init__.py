"""Ops: what one declares, and how it is evaluated.

    @row_loss(Input("pred", features=1, grad=True), Input("target", features=1, grad=True), ...)
    def giou_loss(pred, target, eps):     # the declaration is the torch reference
        return 1 - giou(columns(pred), columns(target), eps)

    @giou_loss.triton                     # given the same arguments, by name
    def _(given):                         # with the kernel's constants that gpu.py does not know
        constants = {"LOSS": ("giou", given.eps)}
        return Tile(kernels.boxes.overlap_kernel, rows=128, constants=constants)

A row op maps rows of its inputs to one loss each, weighs them and sums all but the leading `keep`
dimensions; or (`row_map`) to a few values each, which are returned. The registry is what tests,
`detloss check` and the benchmarks walk.
"""

from .calls import ALIGNED, FusedCall
from .cpu import slices
from .dispatch import DirectOp, FusedOp, RowOp, direct, fused_op, row_loss, row_map, unbound
from .formula import (
    REGISTRY,
    TOLERANCE,
    Call,
    Formula,
    Given,
    Input,
    Sample,
    as_rows,
    mapped,
    row_shape,
    tensors_of,
)
from .fused import (
    DIVISOR,
    NOTHING,
    OWN_SUM,
    OWN_SUM_OR_1,
    SECOND,
    SUM,
    Gradients,
    Passes,
    Plan,
    Sum,
    Tensors,
    new_gradients,
    upstream,
)
from .gpu import TILE, Tile, power_of_2, strided
from .modes import host_sees
from .zeros import rows_at

__all__ = [
    "ALIGNED",
    "DIVISOR",
    "NOTHING",
    "OWN_SUM",
    "OWN_SUM_OR_1",
    "REGISTRY",
    "SECOND",
    "SUM",
    "TILE",
    "TOLERANCE",
    "Call",
    "DirectOp",
    "Formula",
    "FusedCall",
    "FusedOp",
    "Given",
    "Gradients",
    "Input",
    "Passes",
    "Plan",
    "RowOp",
    "Sample",
    "Sum",
    "Tensors",
    "Tile",
    "as_rows",
    "direct",
    "fused_op",
    "host_sees",
    "mapped",
    "new_gradients",
    "power_of_2",
    "row_loss",
    "row_map",
    "row_shape",
    "rows_at",
    "slices",
    "strided",
    "tensors_of",
    "unbound",
    "upstream",
]
