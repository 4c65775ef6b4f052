"""What the assigners share: their targets, and what anchors are told of them. No gradients.

Targets are a tuple of pointers (labels, boxes, counts) to contiguous (B, T), (B, T, 4) and (B,).
What is told is one of (target, label, metric, box), of B times n_anchors rows.

A value and an index make one integer, which has no ties: the value's bits above, the index below.
"""

import triton
import triton.language as tl

from .math import iou_and_grad
from .rows import load_box, store_box

# Of such an integer, the bits of the index.
INDEX: tl.constexpr = tl.constexpr(2**32 - 1)
HIGHEST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def block_of(n_blocks, BA: tl.constexpr):
    """(the row of programs, the block, its BA anchors) of a program among n_blocks of a row."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    block = pid - row * n_blocks
    return row, block, block * BA + tl.arange(0, BA)


@triton.jit
def load_target(targets, n_targets, b, t):
    """(whether row t of image b is a target, its label, its box)."""
    row = b * n_targets + t
    label = tl.load(targets[0] + row).to(tl.int64)
    is_real = (t < tl.load(targets[2] + b)) & (label >= 0)
    return is_real, label, load_box((targets[1], 0, 4, 1), (0, row), None)


@triton.jit
def iou(p, t, EPS: tl.constexpr):
    """IoU; of boxes that hold NaN 0."""
    value, _, _, _, _ = iou_and_grad(p, t, EPS, False)
    return tl.where(value > 0.0, value, 0.0)


@triton.jit
def packed(value, index):
    """Of float32 values that are not negative, or of int32, and indices below 2^32."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index


@triton.jit
def value_of(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tell(told, target, box, targets, first_target, row, mask, EPS: tl.constexpr):
    """Store what boxes, predictions or anchors, are told of their targets; -1 for none.

    first_target: the row of their image's first.
    """
    got = mask & (target >= 0)
    which = first_target + tl.where(got, target, 0)
    label = tl.load(targets[0] + which, mask=got, other=-1).to(tl.int64)
    t = load_box((targets[1], 0, 4, 1), (0, which), got)
    tl.store(told[0] + row, tl.where(got, target, -1), mask=mask)
    tl.store(told[1] + row, label, mask=mask)
    tl.store(told[2] + row, tl.where(got, iou(box, t, EPS), 0.0), mask=mask)
    store_box((told[3], 0, 4, 1), (0, row), t, mask)
