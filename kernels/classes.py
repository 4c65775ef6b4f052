"""Sigmoid losses over classes: one target class per row with a score, never a one-hot.

A tile is [BR rows, BC classes]; a program walks the classes of its rows tile by tile. Triton
specialises the number of classes: of a multiple of 16 it knows that 4 neighbouring classes have one
mask, and reads them with one load.
"""

import triton
import triton.language as tl

from .math import (
    bce_and_grad,
    bce_background,
    focal_and_grad,
    focal_background,
    iou_aware_and_grad,
    log_sum_exp,
    matchability_and_grad,
    quality_focal_and_grad,
    quality_focal_background,
    varifocal_and_grad,
    varifocal_background,
)
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
def loss_and_grad(x, t, LOSS: tl.constexpr):
    """Loss and gradient of entries with a target; LOSS is (name, its constants...)."""
    if LOSS[0] == "bce":
        return bce_and_grad(x, t)
    elif LOSS[0] == "focal":
        return focal_and_grad(x, t, LOSS[1], LOSS[2])
    elif LOSS[0] == "quality_focal":
        return quality_focal_and_grad(x, t, LOSS[1])
    elif LOSS[0] == "varifocal":
        return varifocal_and_grad(x, t)
    elif LOSS[0] == "matchability":
        return matchability_and_grad(x, t, LOSS[2])
    elif LOSS[0] == "iou_aware":
        return iou_aware_and_grad(x, t, LOSS[1], LOSS[3])
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit
def background(x, LOSS: tl.constexpr):
    """Loss and gradient of entries that are not their row's label."""
    if LOSS[0] == "bce":
        return bce_background(x)
    elif LOSS[0] == "focal":
        return focal_background(x, LOSS[1], LOSS[2])
    elif LOSS[0] == "quality_focal":
        return quality_focal_background(x, LOSS[1])
    elif LOSS[0] == "varifocal" or LOSS[0] == "matchability":
        return varifocal_background(x, LOSS[1], LOSS[2])
    elif LOSS[0] == "iou_aware":
        return focal_background(x, -1.0, LOSS[2])
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit
def class_rows(tensors, at, m_row, index, rows, n_features, LOSS: tl.constexpr, BC: tl.constexpr):
    """Sums over classes of BR rows; where there are gradients to write, those, and zeros.

    tensors: (logits, their gradient or None, mask or None). index: each row's label, or None.
    rows: (target, scale) of each row; the target is that of its label, or without labels of all its
    classes, and the scale, finite also in absent rows, multiplies loss and gradient.
    """
    logits, dlogits, mask = tensors
    target, scale = rows
    total = tl.zeros_like(scale)
    if index is not None:
        # Once per row, so that the loop over the classes knows background only.
        m_label = m_row & (index >= 0) & (index < n_features)
        index = tl.where(m_label, index.to(tl.int32), -1)
        p_label = row_pointers(logits, at) + index.to(tl.int64) * logits[3]
        at_label, d_label = loss_and_grad(load(p_label, m_label), target, LOSS)
    for start in range(0, n_features, BC):
        column = start + tl.arange(0, BC)
        m_tile = m_row[:, None] & (column < n_features)[None, :]
        o_column = column.to(tl.int64)
        p_logits = tile_pointers(logits, at, o_column)
        if index is None:
            loss, dx = loss_and_grad(load(p_logits, m_tile), target[:, None], LOSS)
            loss = tl.where(m_tile, loss, 0.0)
        else:
            # Absent entries cost nothing: at -inf background is exactly 0.
            if logits[0].dtype.element_ty.is_floating():
                x = tl.load(p_logits, mask=m_tile, other=float("-inf")).to(tl.float32)
            else:
                x = tl.where(m_tile, load(p_logits, m_tile), float("-inf"))
            loss, dx = background(x, LOSS)
            is_label = column[None, :] == index[:, None]
            loss = tl.where(is_label, at_label[:, None], loss)
            dx = tl.where(is_label, d_label[:, None], dx)
        if mask is not None:
            factor = load(tile_pointers(mask, at, o_column), m_tile)
            loss *= factor
            dx *= factor
        if dlogits is None:
            total += tl.sum(loss, axis=1)
        else:
            tl.store(tile_pointers(dlogits, at, o_column), scale[:, None] * dx, mask=m_tile)
    return scale * total


@triton.jit
def softmax_rows(tensors, at, m_row, index, scale, n_features, BC: tl.constexpr):
    """Softmax cross-entropy of BR rows with the class at `index`, times `scale`, which is 0 in
    absent rows; where there are gradients to write, those."""
    logits, dlogits = tensors
    top = tl.full(scale.shape, float("-inf"), tl.float32)
    total = tl.zeros_like(scale)
    for start in range(0, n_features, BC):
        column = start + tl.arange(0, BC)
        m_column = (column < n_features)[None, :]
        p_tile = tile_pointers(logits, at, column.to(tl.int64))
        x = tl.where(m_column, load(p_tile, m_row[:, None] & m_column), float("-inf"))
        top, total = log_sum_exp(top, total, x)
    at_label = load(row_pointers(logits, at) + index.to(tl.int64) * logits[3], m_row)
    if dlogits is not None:
        for start in range(0, n_features, BC):
            column = start + tl.arange(0, BC)
            m_tile = m_row[:, None] & (column < n_features)[None, :]
            o_column = column.to(tl.int64)
            x = load(tile_pointers(logits, at, o_column), m_tile)
            p = tl.exp(x - top[:, None]) / total[:, None]
            dx = scale[:, None] * (p - (column[None, :] == index[:, None]).to(tl.float32))
            tl.store(tile_pointers(dlogits, at, o_column), dx, mask=m_tile)
    return tl.where(scale != 0.0, scale * (top + tl.log(total) - at_label), 0.0)


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
    index = None
    if label is not None:
        index = tl.load(row_pointers(label, at), mask=m_row, other=-1)
    if p_dout is not None:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
    tensors = (logits, dlogits, mask)
    total = class_rows(tensors, at, m_row, index, (target, scale), n_features, LOSS, BC)
    if p_dout is None:
        put_losses(p_out, total, row, m_row, EACH)
