"""Which rows count, where their number is known. No gradients."""

import triton
import triton.language as tl


@triton.jit
def load_keys(x, row, column, m_column):
    """Keys, uint32, in the order of float32 values: NaN is above all, -0 equals 0."""
    pointers = x[0] + row * x[1] + column.to(tl.int64) * x[2]
    value = tl.load(pointers, mask=m_column, other=0.0).to(tl.float32) + 0.0
    bits = value.to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(value != value, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def count(mask):
    return tl.sum(mask.to(tl.int32), axis=0)


@triton.jit
def kth_largest(x, row, k, n_columns, BC: tl.constexpr):
    """(key of the k-th largest column of a row, how many that equal it are of the k)."""
    # Bit by bit from above: the largest key that k columns reach.
    least = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    while bit > 0:
        candidate = least | bit
        n_reach = tl.zeros([], tl.int32)
        for start in range(0, n_columns, BC):
            column = start + tl.arange(0, BC)
            m_column = column < n_columns
            key = load_keys(x, row, column, m_column)
            n_reach += count(m_column & (key >= candidate))
        least = tl.where(n_reach >= k, candidate, least)
        bit = bit >> 1
    n_above = tl.zeros([], tl.int32)
    for start in range(0, n_columns, BC):
        column = start + tl.arange(0, BC)
        m_column = column < n_columns
        n_above += count(m_column & (load_keys(x, row, column, m_column) > least))
    return least, k - n_above


@triton.jit
def largest(key, m_column, k, least, n_left):
    """(which columns of a block are of the k largest, how many equal ones the next may take).

    `least` and, of the first block, `n_left` are what `kth_largest` says; of equal columns the
    first are taken.
    """
    is_equal = m_column & (key == least)
    is_first = tl.cumsum(is_equal.to(tl.int32), axis=0) <= n_left
    taken = m_column & ((key > least) | (is_equal & is_first)) & (k > 0)
    return taken, n_left - count(is_equal)


@triton.jit(do_not_specialize=["n_columns"])
def hardest_kernel(x, p_k, p_taken, n_columns, BC: tl.constexpr):
    """A row a program, in blocks of BC columns that the cache holds."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(p_k + row).to(tl.int32)
    least, n_left = kth_largest(x, row, k, n_columns, BC)
    for start in range(0, n_columns, BC):
        column = start + tl.arange(0, BC)
        m_column = column < n_columns
        key = load_keys(x, row, column, m_column)
        taken, n_left = largest(key, m_column, k, least, n_left)
        tl.store(p_taken + row * n_columns + column, taken, mask=m_column)


@triton.jit(do_not_specialize=["n_columns", "n"])
def first_set_kernel(mask, p_found, n_columns, n, BC: tl.constexpr):
    """One program, block by block; where fewer than n are set, n_columns in their place."""
    n_set = tl.zeros([], tl.int32)
    for start in range(0, n_columns, BC):
        column = start + tl.arange(0, BC)
        m_column = column < n_columns
        is_set = tl.load(mask[0] + column.to(tl.int64) * mask[1], mask=m_column, other=0) != 0
        rank = n_set + tl.cumsum(is_set.to(tl.int32), axis=0) - 1
        tl.store(p_found + rank, column.to(tl.int64), mask=is_set & (rank < n))
        n_set += count(is_set)
    for start in range(0, n, BC):
        place = start + tl.arange(0, BC)
        tl.store(p_found + place, place * 0 + n_columns, mask=(place >= n_set) & (place < n))
