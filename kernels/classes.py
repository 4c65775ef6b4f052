"""Sigmoid losses over classes: one target class per row with a score, never a one-hot.

A tile is [BR rows, BC classes]; a program walks the classes of its rows tile by tile. Triton
specialises the number of classes: of a multiple of 16 it knows that 4 neighbouring classes have one
mask, and reads them with one load.
"""

import triton
import triton.language as tl

from .math import bce_and_grad, focal_and_grad, quality_focal_and_grad, varifocal_and_grad
from .rows import (
    COUNTS,
    load,
    load_rows,
    put_losses,
    row_pointers,
    rows_of_program,
    tile_pointers,
    upstream,
)


@triton.jit
def loss_and_grad(x, t, is_label, LOSS: tl.constexpr):
    """Loss and gradient of each entry; LOSS is (name, its constants...)."""
    if LOSS[0] == "bce":
        return bce_and_grad(x, t)
    elif LOSS[0] == "focal":
        return focal_and_grad(x, t, LOSS[1], LOSS[2])
    elif LOSS[0] == "quality_focal":
        return quality_focal_and_grad(x, t, LOSS[1])
    elif LOSS[0] == "varifocal":
        return varifocal_and_grad(x, t, is_label, LOSS[1], LOSS[2])
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit(do_not_specialize=COUNTS)
def class_kernel(
    logits, label, score, mask, weight, p_out, p_dout, dlogits,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    LOSS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The row's score, or 1, is the target at its label, or without labels at all classes."""
    segment, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    target = load_rows(score, at, m_row, 1.0)
    scale = load_rows(weight, at, m_row, 1.0)
    if label is not None:
        index = tl.load(row_pointers(label, at), mask=m_row, other=-1)
        is_class = (index >= 0) & (index < n_features)
        index = tl.where(is_class, index.to(tl.int32), -1)
    if p_dout is not None:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
    total = tl.zeros([BR], tl.float32)
    for start in range(0, n_features, BC):
        column = start + tl.arange(0, BC)
        m_tile = m_row[:, None] & (column < n_features)[None, :]
        column = column.to(tl.int64)
        x = load(tile_pointers(logits, at, column), m_tile)  # [BR, BC]
        is_label = m_tile
        if label is not None:
            is_label = column[None, :] == index[:, None]
        t = tl.where(is_label, target[:, None], 0.0)
        loss, dx = loss_and_grad(x, t, is_label, LOSS)
        factor = tl.where(m_tile, scale[:, None], 0.0)
        if mask is not None:
            factor *= load(tile_pointers(mask, at, column), m_tile)
        if p_dout is None:
            total += tl.sum(tl.where(m_tile, factor * loss, 0.0), axis=1)
        else:
            tl.store(tile_pointers(dlogits, at, column), factor * dx, mask=m_tile)
    if p_dout is None:
        put_losses(p_out, total, row, m_row, EACH)
