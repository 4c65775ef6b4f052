"""How a kernel finds its rows, reads and writes them, and where its sums go.

Rows are what has a loss: anchors, queries, box sides. They lie in up to two dimensions, and every
tensor has strides of its own in both, so that permuted and broadcast tensors are read in place. A
tensor is a tuple `(pointer, outer stride, inner stride)`, with a fourth entry, the stride from
feature to feature, if a row has features. A tensor that is not given is None. `at = (outer, inner)`
says which rows.
Rows are summed in segments of `n_segment` consecutive ones (all rows, or one image, or one decoder
layer). A program takes one block of one segment and writes one partial sum: no atomics.
"""

import triton
import triton.language as tl

# Not specialised: they change from step to step, and Triton would compile anew for 1 and for
# multiples of 16. It always specialises the elements of a tuple, so counts are passed one by one.
COUNTS = ["n_segment", "n_blocks", "n_inner"]


@triton.jit
def rows_of_program(
    n_segment, n_blocks, n_inner, GROUP: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr
):
    """(segment, row, at, mask) of this program's BR rows, all in int64.

    GROUP: how many neighbouring rows share their outer index; 0 if rows lie in one dimension.
    WIDE: whether there are more rows than an int32 counts.
    """
    if GROUP > 1:
        # Both are multiples of GROUP. This tells the compiler so, which then reads neighbouring
        # rows with one load.
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
        # In 32 bits where they suffice: a division of 64 bits takes a hundred instructions.
        outer = ((row if WIDE else row.to(tl.int32)) // n_inner).to(tl.int64)
        inner = row - outer * n_inner
    return segment, row, (outer, inner), local < n_segment


@triton.jit
def row_pointers(tensor, at):
    """To the first entry of each row."""
    return tensor[0] + (at[0] * tensor[1] + at[1] * tensor[2])


@triton.jit
def tile_pointers(tensor, at, column):
    """To some columns of each row, [BR, BC]; int64 columns."""
    return row_pointers(tensor, at)[:, None] + (column * tensor[3])[None, :]


@triton.jit
def load(pointers, mask):
    """Values in float32 where the mask is set, else 0; all values if there is no mask."""
    return tl.load(pointers, mask=mask, other=None if mask is None else 0.0).to(tl.float32)


@triton.jit
def load_rows(tensor, at, mask, DEFAULT: tl.constexpr):
    """A value of each row where the mask is set, else 0; DEFAULT for all if there is no tensor."""
    if tensor is None:
        return tl.full(mask.shape, DEFAULT, tl.float32)
    else:
        return load(row_pointers(tensor, at), mask)


@triton.jit
def load_box(tensor, at, mask):
    """The four features of each row."""
    p = row_pointers(tensor, at)
    # In 64 bits, since three times a stride may not fit in 32.
    s = tl.cast(tensor[3], tl.int64)
    return load(p, mask), load(p + s, mask), load(p + 2 * s, mask), load(p + 3 * s, mask)


@triton.jit
def store_box(tensor, at, box, mask):
    p = row_pointers(tensor, at)
    s = tl.cast(tensor[3], tl.int64)
    tl.store(p, box[0], mask=mask)
    tl.store(p + s, box[1], mask=mask)
    tl.store(p + 2 * s, box[2], mask=mask)
    tl.store(p + 3 * s, box[3], mask=mask)


@triton.jit
def row_weight(weight, at, m_row):
    """(weight, mask of the rows to read): whatever a row of weight 0 holds, it adds nothing."""
    scale = tl.where(m_row, 1.0, 0.0)
    if weight is not None:
        scale = load(row_pointers(weight, at), m_row)
    return scale, scale != 0.0


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
