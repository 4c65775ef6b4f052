"""Exact linear sum assignment. No gradients."""

import triton
import triton.language as tl

# Larger than every key; keys are at least 0.
NO_KEY: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def finite(cost, LIMIT: tl.constexpr):
    """The cost in float64, within ±LIMIT; NaN, which fails every comparison, counts as LIMIT."""
    cost = cost.to(tl.float32)
    cost = tl.where(cost < LIMIT, cost, LIMIT)
    return tl.where(cost > -LIMIT, cost, -LIMIT).to(tl.float64)


@triton.jit
def value_at(vector, index):
    """vector[index], for an index known at run time only."""
    return tl.sum(tl.gather(vector, tl.full([1], 0, tl.int32) + index, 0), axis=0)


@triton.jit
def count_of(p_counts, i, most):
    """The i-th count, within [0, most]; most if there are none."""
    n = tl.full([], 0, tl.int32) + most
    if p_counts is not None:
        n = tl.minimum(tl.maximum(tl.load(p_counts + i).to(tl.int32), 0), most)
    return n


# Not specialised, so that one compiled kernel serves problems of every size up to its block. The
# cost is no tuple of pointer and strides, since Triton would specialise these.
_RUNTIME = [
    "p_cost", "p_n_rows", "p_n_cols", "p_column_of_row",
    "s_problem", "s_row", "s_column", "n_counts", "n_rows_max", "n_cols_max",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def assignment_kernel(
    p_cost, p_n_rows, p_n_cols, p_column_of_row,
    s_problem, s_row, s_column, n_counts, n_rows_max, n_cols_max,
    LIMIT: tl.constexpr, COLUMN_BITS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One problem by shortest augmenting paths (Jonker and Volgenant), its state held by column.

    Counts are of every n_counts problems in turn.

    The shorter side is added row by row, so every row finds a free column. The duals v are those
    of columns. An assigned edge is tight, so the dual of column j's row is cost[row, j] - v[j].
    The index of a column takes COLUMN_BITS bits.
    """
    # A column's key orders it among columns at one distance. High bits: its row + 1, 0 if it is
    # free. Low bits: the column.
    COLUMN_MASK: tl.constexpr = (1 << COLUMN_BITS) - 1
    # A column's link leads back along the path. High bits: its row + 1. Low bits: the column
    # before it + 1.
    LINK_BITS: tl.constexpr = COLUMN_BITS + 1
    LINK_MASK: tl.constexpr = (1 << LINK_BITS) - 1
    problem = tl.program_id(0).to(tl.int64)
    n_rows = count_of(p_n_rows, problem % n_counts, n_rows_max)
    n_cols = count_of(p_n_cols, problem % n_counts, n_cols_max)
    swapped = n_rows > n_cols
    n_short = tl.where(swapped, n_cols, n_rows)
    n_long = tl.where(swapped, n_rows, n_cols)
    s_short = tl.where(swapped, s_column, s_row)
    s_long = tl.where(swapped, s_row, s_column)

    column = tl.arange(0, BC)
    m_column = column < n_long
    p_problem = p_cost + problem * s_problem
    p_columns = p_problem + column.to(tl.int64) * s_long  # [BC]
    inf = float("inf")
    v = tl.full([BC], 0.0, tl.float64)
    key = column
    root = tl.full([], 0, tl.int32)
    while root < n_short:
        distance = tl.full([BC], inf, tl.float64)
        previous = tl.full([BC], -1, tl.int32)
        scanned = column < 0
        row = root
        j = tl.full([], -1, tl.int32)
        least = tl.full([], 0.0, tl.float64)
        offset = tl.full([], 0.0, tl.float64)
        while row >= 0:
            o_row = row.to(tl.int64) * s_short
            cost = finite(tl.load(p_columns + o_row, mask=m_column, other=0.0), LIMIT)
            # Read along with the row, so nothing waits for it; the root has no column yet.
            tight = tl.load(p_problem + o_row + j.to(tl.int64) * s_long, mask=j >= 0, other=0.0)
            offset = offset - finite(tight, LIMIT)
            through = (cost - v) + offset
            closer = m_column & ~scanned & (through < distance)
            distance = tl.where(closer, through, distance)
            previous = tl.where(closer, j, previous)
            candidate = tl.where(scanned, inf, distance)
            least = tl.min(candidate, axis=0)
            # The least key of the nearest columns is that of a free one, if there is one.
            nearest = tl.min(tl.where(m_column & (candidate == least), key, NO_KEY), axis=0)
            j = nearest & COLUMN_MASK
            row = (nearest >> COLUMN_BITS) - 1
            scanned = scanned | (column == j)
            offset = least + value_at(v, j)
        v = tl.where(scanned, v + (distance - least), v)

        # Every column of the path takes the row of the one before it, the first one the root.
        links = ((key >> COLUMN_BITS) << LINK_BITS) | (previous + 1)
        link = tl.max(tl.where(column == j, links, 0), axis=0)
        before = (link & LINK_MASK) - 1
        while before >= 0:
            link = tl.max(tl.where(column == before, links, 0), axis=0)
            key = tl.where(column == j, ((link >> LINK_BITS) << COLUMN_BITS) | column, key)
            j = before
            before = (link & LINK_MASK) - 1
        key = tl.where(column == j, ((root + 1) << COLUMN_BITS) | column, key)
        root += 1

    row_of_column = (key >> COLUMN_BITS) - 1
    p_out = p_column_of_row + problem * n_rows_max
    if swapped:
        # Columns here are the caller's rows, those beyond n_rows or unmatched included.
        tl.store(p_out + column, row_of_column.to(tl.int64), mask=column < n_rows_max)
    else:
        tl.store(p_out + row_of_column, column.to(tl.int64), mask=row_of_column >= 0)
        unmatched = (column >= n_rows) & (column < n_rows_max)
        tl.store(p_out + column, tl.full([BC], -1, tl.int64), mask=unmatched)
