"""How every row-wise kernel finds its rows, and where its sums go.

A loss has rows: anchors, queries, box sides. They lie in up to two dimensions (outer, inner), each
with its own stride in every tensor, so that permuted and broadcast tensors are read in place.
Rows are summed in segments of `n_segment` consecutive ones (all rows, or one image, or one decoder
layer); a program takes one block of one segment and writes one partial sum: no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_program(
    n_segment, n_blocks, n_inner, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr
):
    """(segment, outer, inner, row, mask) of this program's rows; int64, for 2^31 is not far.

    GROUP is 0 if the rows lie in one dimension; else so many neighbours share their outer index.
    WIDE says that there are more rows than an int32 counts.
    """
    if GROUP > 1:
        # Says to the compiler what is so anyway: neighbouring rows are then read together.
        n_segment = n_segment // GROUP * GROUP
        n_inner = n_inner // GROUP * GROUP
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // n_blocks
    local = (pid - segment * n_blocks) * BR + tl.arange(0, BR)
    row = segment * n_segment + local
    if GROUP == 0:
        outer = row * 0
        inner = row
    else:
        # One of 64 bits would be a subroutine.
        outer = ((row if WIDE else row.to(tl.int32)) // n_inner).to(tl.int64)
        inner = row - outer * n_inner
    return segment, outer, inner, row, local < n_segment


@triton.jit
def row_weight(p_weight, outer, inner, s_weight_o, s_weight_i, m_row, HAS_WEIGHT: tl.constexpr):
    """(weight, mask): a row of weight 0 is not read, so whatever it holds adds exactly nothing."""
    weight = tl.where(m_row, 1.0, 0.0)
    if HAS_WEIGHT:
        o_weight = outer * s_weight_o + inner * s_weight_i
        weight = tl.load(p_weight + o_weight, mask=m_row, other=0.0).to(tl.float32)
    return weight, weight != 0.0


@triton.jit
def of_column(column: tl.constexpr, s_f):
    """The offset of a column; int64, as a stride of 2^30 fits an int32 and thrice it does not."""
    return tl.full([], column, tl.int64) * s_f


@triton.jit
def put_losses(p_out, loss, row, m_row, EACH: tl.constexpr):
    """Store each row's loss, or this program's partial sum."""
    if EACH:
        tl.store(p_out + row, loss, mask=m_row)
    else:
        tl.store(p_out + tl.program_id(0), tl.sum(tl.where(m_row, loss, 0.0), axis=0))


@triton.jit
def upstream(p_dout, segment, row, m_row, EACH: tl.constexpr):
    """The upstream gradient of each row's loss: its own, or that of its segment's sum."""
    if EACH:
        gradient = tl.load(p_dout + row, mask=m_row, other=0.0)
    else:
        gradient = tl.load(p_dout + segment)
    return gradient.to(tl.float32)
