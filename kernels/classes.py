"""Sigmoid losses over classes: one target class per row with a score, never a one-hot.

A tile is [BR rows, BC classes]; a program walks the classes of its rows tile by tile. The number of
classes is specialised, unlike counts that change from step to step: where it divides by 16, a mask
over classes is known to be the same for 4 neighbours, without which no load is wider than one.
"""

import triton
import triton.language as tl

from .math import bce_and_grad, focal_and_grad, quality_focal_and_grad, varifocal_and_grad
from .rows import put_losses, rows_of_program, upstream


@triton.jit
def loss_and_grad(x, t, is_label, LOSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    if LOSS == "bce":
        return bce_and_grad(x, t)
    elif LOSS == "focal":
        return focal_and_grad(x, t, A, B)
    elif LOSS == "quality_focal":
        return quality_focal_and_grad(x, t, A)
    elif LOSS == "varifocal":
        return varifocal_and_grad(x, t, is_label, A, B)
    else:
        tl.static_assert(False, "no branch for this LOSS")


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner"])
def class_kernel(
    p_logits, p_label, p_score, p_mask, p_weight, p_out, p_dout, p_dlogits,
    s_logits_o, s_logits_i, s_logits_f, s_label_o, s_label_i, s_score_o, s_score_i,
    s_mask_o, s_mask_i, s_mask_f, s_weight_o, s_weight_i,
    s_dlogits_o, s_dlogits_i, s_dlogits_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_LABEL: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, BR: tl.constexpr, LOSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Without a label every class of the row has the row's score as its target."""
    segment, outer, inner, row, m_row = rows_of_program(
        n_segment, n_blocks, n_inner, GROUP, WIDE, BR
    )
    score = tl.full([BR], 1.0, tl.float32)
    if HAS_SCORE:
        o_score = outer * s_score_o + inner * s_score_i
        score = tl.load(p_score + o_score, mask=m_row, other=0.0).to(tl.float32)
    weight = tl.full([BR], 1.0, tl.float32)
    if HAS_WEIGHT:
        o_weight = outer * s_weight_o + inner * s_weight_i
        weight = tl.load(p_weight + o_weight, mask=m_row, other=0.0).to(tl.float32)
    if HAS_LABEL:
        o_label = outer * s_label_o + inner * s_label_i
        label = tl.load(p_label + o_label, mask=m_row, other=-1)
        is_class = (label >= 0) & (label < n_features)
        label = tl.where(is_class, label.to(tl.int32), -1)
    if BACKWARD:
        weight = weight * upstream(p_dout, segment, row, m_row, EACH)
    o_logits = outer * s_logits_o + inner * s_logits_i
    o_mask = outer * s_mask_o + inner * s_mask_i
    o_dlogits = outer * s_dlogits_o + inner * s_dlogits_i
    total = tl.zeros([BR], tl.float32)
    for start in range(0, n_features, BC):
        column = start + tl.arange(0, BC)
        m_tile = m_row[:, None] & (column < n_features)[None, :]
        column = column.to(tl.int64)
        x = tl.load(
            p_logits + o_logits[:, None] + (column * s_logits_f)[None, :], mask=m_tile, other=0.0
        ).to(tl.float32)  # [BR, BC]
        is_label = m_tile
        if HAS_LABEL:
            is_label = column[None, :] == label[:, None]
        t = tl.where(is_label, score[:, None], 0.0)
        loss, dx = loss_and_grad(x, t, is_label, LOSS, A, B)
        scale = tl.where(m_tile, weight[:, None], 0.0)
        if HAS_MASK:
            scale *= tl.load(
                p_mask + o_mask[:, None] + (column * s_mask_f)[None, :], mask=m_tile, other=0.0
            ).to(tl.float32)
        if BACKWARD:
            p_tile = p_dlogits + o_dlogits[:, None] + (column * s_dlogits_f)[None, :]
            tl.store(p_tile, (scale * dx).to(p_dlogits.dtype.element_ty), mask=m_tile)
        else:
            total += tl.sum(tl.where(m_tile, scale * loss, 0.0), axis=1)
    if not BACKWARD:
        put_losses(p_out, total, row, m_row, EACH)
