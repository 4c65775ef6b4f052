"""Losses between pairs of boxes or of coordinates: one row a lane, nothing shared between rows."""

import triton
import triton.language as tl

from .math import (
    by_deltas,
    ciou_loss_and_grad,
    delta_decode,
    diou_loss_and_grad,
    giou_loss_and_grad,
    iou_loss_and_grad,
    l1_and_grad,
    masked,
    smooth_l1_and_grad,
    times,
)
from .rows import (
    COUNTS,
    load,
    load_box,
    put_losses,
    row_weight,
    rows_of_program,
    store_box,
    tile_pointers,
    upstream,
)


@triton.jit
def overlap_loss_and_grad(p, t, LOSS: tl.constexpr):
    """Loss and gradients of a pair of boxes; LOSS is (name, its constants...)."""
    if LOSS[0] == "iou":
        # Before Triton 3.7 a string taken out of a tuple is no constexpr.
        return iou_loss_and_grad(p, t, LOSS[1], LOSS[2], tl.constexpr(LOSS[3]))
    elif LOSS[0] == "giou":
        return giou_loss_and_grad(p, t, LOSS[1])
    elif LOSS[0] == "diou":
        return diou_loss_and_grad(p, t, LOSS[1])
    elif LOSS[0] == "ciou":
        return ciou_loss_and_grad(p, t, LOSS[1], LOSS[2])
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit(do_not_specialize=[*COUNTS, "n_features"])
def overlap_kernel(
    pred, target, weight, p_out, p_dout, dpred, dtarget,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    LOSS: tl.constexpr,
):  # fmt: skip
    """A loss of each pair of boxes xyxy."""
    segment, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    loss, dp, dt = overlap_loss_and_grad(
        load_box(pred, at, m_used), load_box(target, at, m_used), LOSS
    )
    if p_dout is None:
        put_losses(p_out, tl.where(m_used, scale * loss, 0.0), row, m_row, EACH)
    else:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
        if dpred is not None:
            store_box(dpred, at, masked(times(dp, scale), m_used), m_row)
        if dtarget is not None:
            store_box(dtarget, at, masked(times(dt, scale), m_used), m_row)


@triton.jit
def distance_and_grad(difference, LOSS: tl.constexpr):
    if LOSS[0] == "l1":
        return l1_and_grad(difference)
    elif LOSS[0] == "smooth_l1":
        return smooth_l1_and_grad(difference, LOSS[1])
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit(do_not_specialize=[*COUNTS, "n_features"])
def distance_kernel(
    pred, target, weight, p_out, p_dout, dpred, dtarget,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    LOSS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A loss of each pair of coordinates, summed over a row; BF >= n_features."""
    segment, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    column = tl.arange(0, BF).to(tl.int64)
    m_column = (column < n_features)[None, :]
    m_tile = m_used[:, None] & m_column  # [BR, BF]
    p = load(tile_pointers(pred, at, column), m_tile)
    t = load(tile_pointers(target, at, column), m_tile)
    loss, dp = distance_and_grad(p - t, LOSS)
    if p_dout is None:
        loss = tl.sum(tl.where(m_tile, scale[:, None] * loss, 0.0), axis=1)
        put_losses(p_out, loss, row, m_row, EACH)
    else:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
        dp = tl.where(m_tile, scale[:, None] * dp, 0.0)
        m_store = m_row[:, None] & m_column
        if dpred is not None:
            tl.store(tile_pointers(dpred, at, column), dp, mask=m_store)
        if dtarget is not None:
            tl.store(tile_pointers(dtarget, at, column), -dp, mask=m_store)


@triton.jit(do_not_specialize=[*COUNTS, "n_features"])
def delta_decode_kernel(
    deltas, anchors, weight, p_out, p_dout, ddeltas,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Boxes xyxy from normalised deltas (x, y, width, height) and anchors."""
    _, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    box, slopes = delta_decode(load_box(deltas, at, m_used), load_box(anchors, at, m_used), CODE)
    # Boxes and their gradients are contiguous.
    if p_dout is None:
        store_box((p_out, 0, 4, 1), (0, row), times(box, scale), m_row)
    else:
        by_box = times(load_box((p_dout, 0, 4, 1), (0, row), m_used), scale)
        store_box(ddeltas, at, by_deltas(by_box, slopes), m_row)


@triton.jit(do_not_specialize=[*COUNTS, "n_features"])
def distance_decode_kernel(
    distances, points, weight, p_out, p_dout, ddistances,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Boxes xyxy from points and the distances to left, top, right and bottom.

    In [BR, 4] tiles, which are read and written with wide accesses.
    """
    _, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    column = tl.arange(0, 4).to(tl.int64)
    m_column = (column < 4)[None, :]
    m_tile = m_used[:, None] & m_column
    m_store = m_row[:, None] & m_column
    sign = tl.where(column < 2, -1.0, 1.0)[None, :]
    o_out = row[:, None] * 4 + column[None, :]
    if p_dout is None:
        distance = load(tile_pointers(distances, at, column), m_tile)
        point = load(tile_pointers(points, at, column % 2), m_tile)
        tl.store(p_out + o_out, scale[:, None] * (point + sign * distance), mask=m_store)
    else:
        gradient = sign * scale[:, None] * load(p_dout + o_out, m_tile)
        tl.store(tile_pointers(ddistances, at, column), gradient, mask=m_store)
