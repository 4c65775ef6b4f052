"""Losses over a discrete distribution per row: a tile holds whole rows, [BR, BK], BK >= bins.

Triton specialises the number of bins, for wide loads, as that of classes in `classes.py`.
"""

import triton
import triton.language as tl

from .math import distillation_and_grad, two_bin_and_grad
from .rows import (
    COUNTS,
    load,
    load_rows,
    put_losses,
    row_pointers,
    row_weight,
    rows_of_program,
    tile_pointers,
    upstream,
)


@triton.jit(do_not_specialize=COUNTS)
def two_bin_kernel(
    logits, left, weight_left, weight_right, weight, p_out, p_dout, dlogits,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A row whose left bin does not exist costs 0; so does a right bin beyond the last."""
    segment, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    index = tl.load(row_pointers(left, at), mask=m_used, other=-1)
    m_used = m_used & (index >= 0) & (index < n_features)
    index = tl.where(m_used, index.to(tl.int32), -1)
    of_left = load_rows(weight_left, at, m_used, 1.0)
    of_right = load_rows(weight_right, at, m_used, 0.0)
    of_right = tl.where(index + 1 < n_features, of_right, 0.0)
    column = tl.arange(0, BK)
    m_column = (column < n_features)[None, :]
    is_left = column[None, :] == index[:, None]
    is_right = column[None, :] == (index + 1)[:, None]
    column = column.to(tl.int64)
    x = load(tile_pointers(logits, at, column), m_used[:, None] & m_column)
    x = tl.where(m_column, x, float("-inf"))
    loss, dx = two_bin_and_grad(x, is_left, is_right, of_left[:, None], of_right[:, None])
    if p_dout is None:
        put_losses(p_out, tl.where(m_used, scale * loss, 0.0), row, m_row, EACH)
    else:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
        dx = tl.where(m_used[:, None], scale[:, None] * dx, 0.0)
        tl.store(tile_pointers(dlogits, at, column), dx, mask=m_row[:, None] & m_column)


@triton.jit(do_not_specialize=COUNTS)
def distillation_kernel(
    student, teacher, weight, p_out, p_dout, dstudent,
    n_segment, n_blocks, n_inner, n_features,
    EACH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Divergence of a student's distribution from its teacher's, row by row."""
    segment, row, at, m_row = rows_of_program(n_segment, n_blocks, n_inner, GROUP, WIDE, BR)
    scale, m_used = row_weight(weight, at, m_row)
    column = tl.arange(0, BK).to(tl.int64)
    m_column = (column < n_features)[None, :]
    m_tile = m_used[:, None] & m_column
    x = load(tile_pointers(student, at, column), m_tile)
    t = load(tile_pointers(teacher, at, column), m_tile)
    loss, dx = distillation_and_grad(x, t, m_column, TEMPERATURE)
    if p_dout is None:
        put_losses(p_out, tl.where(m_used, scale * loss, 0.0), row, m_row, EACH)
    else:
        scale *= upstream(p_dout, segment, row, m_row, EACH)
        dx = tl.where(m_tile, scale[:, None] * dx, 0.0)
        tl.store(tile_pointers(dstudent, at, column), dx, mask=m_row[:, None] & m_column)
