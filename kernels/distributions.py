"""Losses over a discrete distribution per row: a tile holds whole rows, [BR, BK], BK >= bins.

The number of bins is specialised as that of classes is, for wide loads.
"""

import triton
import triton.language as tl

from .math import distillation_and_grad, two_bin_and_grad
from .rows import put_losses, row_weight, rows_of_program, upstream


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner"])
def two_bin_kernel(
    p_logits, p_left, p_weight_left, p_weight_right, p_weight, p_out, p_dout, p_dlogits,
    s_logits_o, s_logits_i, s_logits_f, s_left_o, s_left_i, s_weight_left_o, s_weight_left_i,
    s_weight_right_o, s_weight_right_i, s_weight_o, s_weight_i,
    s_dlogits_o, s_dlogits_i, s_dlogits_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT_LEFT: tl.constexpr, HAS_WEIGHT_RIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A row whose left bin is no bin weighs nothing; a right bin beyond the last is left out."""
    segment, outer, inner, row, m_row = rows_of_program(
        n_segment, n_blocks, n_inner, GROUP, WIDE, BR
    )
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    o_left = outer * s_left_o + inner * s_left_i
    left = tl.load(p_left + o_left, mask=m_used, other=-1).to(tl.int64)
    m_used = m_used & (left >= 0) & (left < n_features)
    weight_left = tl.full([BR], 1.0, tl.float32)
    if HAS_WEIGHT_LEFT:
        o_weight_left = outer * s_weight_left_o + inner * s_weight_left_i
        weight_left = tl.load(p_weight_left + o_weight_left, mask=m_used, other=0.0).to(tl.float32)
    weight_right = tl.zeros([BR], tl.float32)
    if HAS_WEIGHT_RIGHT:
        o_right = outer * s_weight_right_o + inner * s_weight_right_i
        weight_right = tl.load(p_weight_right + o_right, mask=m_used, other=0.0).to(tl.float32)
        weight_right = tl.where(left + 1 < n_features, weight_right, 0.0)
    column = tl.arange(0, BK)
    m_column = column < n_features
    is_left = column[None, :] == left[:, None]
    is_right = column[None, :] == (left + 1)[:, None]
    column = column.to(tl.int64)
    o_x = (outer * s_logits_o + inner * s_logits_i)[:, None] + (column * s_logits_f)[None, :]
    m_tile = m_used[:, None] & m_column[None, :]
    x = tl.load(p_logits + o_x, mask=m_tile, other=0.0).to(tl.float32)
    x = tl.where(m_column[None, :], x, float("-inf"))
    loss, dx = two_bin_and_grad(x, is_left, is_right, weight_left[:, None], weight_right[:, None])
    if BACKWARD:
        scale = weight * upstream(p_dout, segment, row, m_row, EACH)
        dx = tl.where(m_used[:, None], scale[:, None] * dx, 0.0)
        o_d = (outer * s_dlogits_o + inner * s_dlogits_i)[:, None] + (column * s_dlogits_f)[None, :]
        m_store = m_row[:, None] & m_column[None, :]
        tl.store(p_dlogits + o_d, dx.to(p_dlogits.dtype.element_ty), mask=m_store)
    else:
        put_losses(p_out, tl.where(m_used, weight * loss, 0.0), row, m_row, EACH)


@triton.jit(do_not_specialize=["n_segment", "n_blocks", "n_inner"])
def distillation_kernel(
    p_student, p_teacher, p_weight, p_out, p_dout, p_dstudent,
    s_student_o, s_student_i, s_student_f, s_teacher_o, s_teacher_i, s_teacher_f,
    s_weight_o, s_weight_i, s_dstudent_o, s_dstudent_i, s_dstudent_f,
    n_segment, n_blocks, n_inner, n_features,
    HAS_WEIGHT: tl.constexpr, BACKWARD: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """A student's distribution pulled towards its teacher's, row by row."""
    segment, outer, inner, row, m_row = rows_of_program(
        n_segment, n_blocks, n_inner, GROUP, WIDE, BR
    )
    weight, m_used = row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT)
    column = tl.arange(0, BK).to(tl.int64)
    m_column = (column < n_features)[None, :]
    m_tile = m_used[:, None] & m_column
    o_x = (outer * s_student_o + inner * s_student_i)[:, None] + (column * s_student_f)[None, :]
    o_t = (outer * s_teacher_o + inner * s_teacher_i)[:, None] + (column * s_teacher_f)[None, :]
    x = tl.load(p_student + o_x, mask=m_tile, other=0.0).to(tl.float32)
    t = tl.load(p_teacher + o_t, mask=m_tile, other=0.0).to(tl.float32)
    loss, dx = distillation_and_grad(x, t, m_column, TEMPERATURE)
    if BACKWARD:
        scale = weight * upstream(p_dout, segment, row, m_row, EACH)
        dx = tl.where(m_tile, scale[:, None] * dx, 0.0)
        o_d = (outer * s_dstudent_o + inner * s_dstudent_i)[:, None]
        p_tile = p_dstudent + o_d + (column * s_dstudent_f)[None, :]
        tl.store(p_tile, dx.to(p_dstudent.dtype.element_ty), mask=m_row[:, None] & m_column)
    else:
        put_losses(p_out, tl.where(m_used, weight * loss, 0.0), row, m_row, EACH)
