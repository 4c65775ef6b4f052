"""Losses between pairs of boxes or of coordinates: one row a lane, nothing shared between rows."""

import triton
import triton.language as tl

from .math import (
    ciou_loss_and_grad,
    delta_decode_1d,
    diou_loss_and_grad,
    giou_loss_and_grad,
    iou_loss_and_grad,
    l1_and_grad,
    smooth_l1_and_grad,
)
from .rows import of_column, put_losses, row_weight, rows_of_program, upstream


@triton.jit
def store_column(p, column: tl.constexpr, offset, s_f, value, m_row):
    tl.store(p + offset + of_column(column, s_f), value.to(p.dtype.element_ty), mask=m_row)


@triton.jit
def load_column(p, column: tl.constexpr, offset, s_f, m_row):
    return tl.load(p + offset + of_column(column, s_f), mask=m_row, other=0.0).to(tl.float32)


@triton.jit
def overlap_loss_and_grad(
    px1, py1, px2, py2, tx1, ty1, tx2, ty2,
    LOSS: tl.constexpr, EPS: tl.constexpr, OPTION: tl.constexpr,
):  # fmt: skip
    if LOSS == "iou":
        return iou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, OPTION, EPS)
    elif LOSS == "giou":
        return giou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS)
    elif LOSS == "diou":
        return diou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS)
    elif LOSS == "ciou":
        return ciou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS, OPTION)
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner", "n_features"])
def overlap_kernel(
    p_pred, p_target, p_weight, p_out, p_dout, p_dpred, p_dtarget,
    s_pred_o, s_pred_i, s_pred_f, s_target_o, s_target_i, s_target_f, s_weight_o, s_weight_i,
    s_dpred_o, s_dpred_i, s_dpred_f, s_dtarget_o, s_dtarget_i, s_dtarget_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT: tl.constexpr, GRAD_PRED: tl.constexpr, GRAD_TARGET: tl.constexpr,
    BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, LOSS: tl.constexpr, EPS: tl.constexpr, OPTION: tl.constexpr,
):  # fmt: skip
    """Boxes xyxy, four columns each."""
    segment, outer, inner, row, m_row = rows_of_program(
        n_segment, n_blocks, n_inner, GROUP, WIDE, BR
    )
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    o_p = outer * s_pred_o + inner * s_pred_i
    o_t = outer * s_target_o + inner * s_target_i
    loss, a, b, c, d, e, f, g, h = overlap_loss_and_grad(
        load_column(p_pred, 0, o_p, s_pred_f, m_used),
        load_column(p_pred, 1, o_p, s_pred_f, m_used),
        load_column(p_pred, 2, o_p, s_pred_f, m_used),
        load_column(p_pred, 3, o_p, s_pred_f, m_used),
        load_column(p_target, 0, o_t, s_target_f, m_used),
        load_column(p_target, 1, o_t, s_target_f, m_used),
        load_column(p_target, 2, o_t, s_target_f, m_used),
        load_column(p_target, 3, o_t, s_target_f, m_used),
        LOSS, EPS, OPTION,
    )  # fmt: skip
    if BACKWARD:
        scale = weight * upstream(p_dout, segment, row, m_row, EACH)
        if GRAD_PRED:
            o_d = outer * s_dpred_o + inner * s_dpred_i
            store_column(p_dpred, 0, o_d, s_dpred_f, tl.where(m_used, scale * a, 0.0), m_row)
            store_column(p_dpred, 1, o_d, s_dpred_f, tl.where(m_used, scale * b, 0.0), m_row)
            store_column(p_dpred, 2, o_d, s_dpred_f, tl.where(m_used, scale * c, 0.0), m_row)
            store_column(p_dpred, 3, o_d, s_dpred_f, tl.where(m_used, scale * d, 0.0), m_row)
        if GRAD_TARGET:
            o_d = outer * s_dtarget_o + inner * s_dtarget_i
            store_column(p_dtarget, 0, o_d, s_dtarget_f, tl.where(m_used, scale * e, 0.0), m_row)
            store_column(p_dtarget, 1, o_d, s_dtarget_f, tl.where(m_used, scale * f, 0.0), m_row)
            store_column(p_dtarget, 2, o_d, s_dtarget_f, tl.where(m_used, scale * g, 0.0), m_row)
            store_column(p_dtarget, 3, o_d, s_dtarget_f, tl.where(m_used, scale * h, 0.0), m_row)
    else:
        put_losses(p_out, tl.where(m_used, weight * loss, 0.0), row, m_row, EACH)


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner", "n_features"])
def distance_kernel(
    p_pred, p_target, p_weight, p_out, p_dout, p_dpred, p_dtarget,
    s_pred_o, s_pred_i, s_pred_f, s_target_o, s_target_i, s_target_f, s_weight_o, s_weight_i,
    s_dpred_o, s_dpred_i, s_dpred_f, s_dtarget_o, s_dtarget_i, s_dtarget_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT: tl.constexpr, GRAD_PRED: tl.constexpr, GRAD_TARGET: tl.constexpr,
    BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, LOSS: tl.constexpr, BETA: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Coordinate by coordinate, summed over the row's BF >= n_features columns."""
    segment, outer, inner, row, m_row = rows_of_program(
        n_segment, n_blocks, n_inner, GROUP, WIDE, BR
    )
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    column = tl.arange(0, BF).to(tl.int64)
    m_column = column < n_features
    m_tile = m_used[:, None] & m_column[None, :]  # [BR, BF]
    m_store = m_row[:, None] & m_column[None, :]
    o_p = (outer * s_pred_o + inner * s_pred_i)[:, None] + (column * s_pred_f)[None, :]
    o_t = (outer * s_target_o + inner * s_target_i)[:, None] + (column * s_target_f)[None, :]
    pred = tl.load(p_pred + o_p, mask=m_tile, other=0.0).to(tl.float32)
    target = tl.load(p_target + o_t, mask=m_tile, other=0.0).to(tl.float32)
    if LOSS == "l1":
        loss, dx = l1_and_grad(pred - target)
    else:
        loss, dx = smooth_l1_and_grad(pred - target, BETA)
    if BACKWARD:
        scale = weight * upstream(p_dout, segment, row, m_row, EACH)
        dx = tl.where(m_tile, scale[:, None] * dx, 0.0)
        if GRAD_PRED:
            o_d = (outer * s_dpred_o + inner * s_dpred_i)[:, None] + (column * s_dpred_f)[None, :]
            tl.store(p_dpred + o_d, dx.to(p_dpred.dtype.element_ty), mask=m_store)
        if GRAD_TARGET:
            o_d = (outer * s_dtarget_o + inner * s_dtarget_i)[:, None]
            o_d += (column * s_dtarget_f)[None, :]
            tl.store(p_dtarget + o_d, (-dx).to(p_dtarget.dtype.element_ty), mask=m_store)
    else:
        loss = tl.sum(tl.where(m_tile, weight[:, None] * loss, 0.0), axis=1)
        put_losses(p_out, loss, row, m_row, EACH)


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner", "n_features"])
def delta_decode_kernel(
    p_deltas, p_anchors, p_weight, p_out, p_dout, p_ddeltas,
    s_deltas_o, s_deltas_i, s_deltas_f, s_anchors_o, s_anchors_i, s_anchors_f,
    s_weight_o, s_weight_i, s_ddeltas_o, s_ddeltas_i, s_ddeltas_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT: tl.constexpr, BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, BR: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    MEAN_X: tl.constexpr, MEAN_Y: tl.constexpr, MEAN_W: tl.constexpr, MEAN_H: tl.constexpr,
    STD_X: tl.constexpr, STD_Y: tl.constexpr, STD_W: tl.constexpr, STD_H: tl.constexpr,
):  # fmt: skip
    """Boxes xyxy from normalised deltas and anchors."""
    _, outer, inner, row, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    o_d = outer * s_deltas_o + inner * s_deltas_i
    o_a = outer * s_anchors_o + inner * s_anchors_i
    x1, x2, x_slope, x_half = delta_decode_1d(
        load_column(p_deltas, 0, o_d, s_deltas_f, m_used) * STD_X + MEAN_X,
        load_column(p_deltas, 2, o_d, s_deltas_f, m_used) * STD_W + MEAN_W,
        load_column(p_anchors, 0, o_a, s_anchors_f, m_used),
        load_column(p_anchors, 2, o_a, s_anchors_f, m_used),
        LIMIT, SHIFT,
    )  # fmt: skip
    y1, y2, y_slope, y_half = delta_decode_1d(
        load_column(p_deltas, 1, o_d, s_deltas_f, m_used) * STD_Y + MEAN_Y,
        load_column(p_deltas, 3, o_d, s_deltas_f, m_used) * STD_H + MEAN_H,
        load_column(p_anchors, 1, o_a, s_anchors_f, m_used),
        load_column(p_anchors, 3, o_a, s_anchors_f, m_used),
        LIMIT, SHIFT,
    )  # fmt: skip
    o_out = row * 4
    if BACKWARD:
        dx1 = load_column(p_dout, 0, o_out, 1, m_used) * weight
        dy1 = load_column(p_dout, 1, o_out, 1, m_used) * weight
        dx2 = load_column(p_dout, 2, o_out, 1, m_used) * weight
        dy2 = load_column(p_dout, 3, o_out, 1, m_used) * weight
        o_g = outer * s_ddeltas_o + inner * s_ddeltas_i
        store_column(p_ddeltas, 0, o_g, s_ddeltas_f, (dx1 + dx2) * x_slope * STD_X, m_row)
        store_column(p_ddeltas, 1, o_g, s_ddeltas_f, (dy1 + dy2) * y_slope * STD_Y, m_row)
        store_column(p_ddeltas, 2, o_g, s_ddeltas_f, (dx2 - dx1) * x_half * STD_W, m_row)
        store_column(p_ddeltas, 3, o_g, s_ddeltas_f, (dy2 - dy1) * y_half * STD_H, m_row)
    else:
        store_column(p_out, 0, o_out, 1, weight * x1, m_row)
        store_column(p_out, 1, o_out, 1, weight * y1, m_row)
        store_column(p_out, 2, o_out, 1, weight * x2, m_row)
        store_column(p_out, 3, o_out, 1, weight * y2, m_row)


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner", "n_features"])
def distance_decode_kernel(
    p_distances, p_points, p_weight, p_out, p_dout, p_ddistances,
    s_distances_o, s_distances_i, s_distances_f, s_points_o, s_points_i, s_points_f,
    s_weight_o, s_weight_i, s_ddistances_o, s_ddistances_i, s_ddistances_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT: tl.constexpr, BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Boxes xyxy from points and the distances to left, top, right and bottom: [BR, 4] tiles."""
    _, outer, inner, row, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    column = tl.arange(0, 4).to(tl.int64)
    sign = tl.where(column < 2, -1.0, 1.0)[None, :]
    m_tile = m_used[:, None] & (column < 4)[None, :]
    m_store = m_row[:, None] & (column < 4)[None, :]
    o_out = row[:, None] * 4 + column[None, :]
    if BACKWARD:
        o_g = (outer * s_ddistances_o + inner * s_ddistances_i)[:, None]
        gradient = (
            sign * weight[:, None] * tl.load(p_dout + o_out, mask=m_tile, other=0.0).to(tl.float32)
        )
        p_tile = p_ddistances + o_g + (column * s_ddistances_f)[None, :]
        tl.store(p_tile, gradient.to(p_ddistances.dtype.element_ty), mask=m_store)
    else:
        o_d = (outer * s_distances_o + inner * s_distances_i)[:, None]
        o_p = (outer * s_points_o + inner * s_points_i)[:, None]
        p_tile = p_distances + o_d + (column * s_distances_f)[None, :]
        distance = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        p_tile = p_points + o_p + ((column % 2) * s_points_f)[None, :]
        point = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        tl.store(p_out + o_out, weight[:, None] * (point + sign * distance), mask=m_store)
