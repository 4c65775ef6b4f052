"""From partial sums to losses: what programs have written is added in a fixed order and divided."""

import triton
import triton.language as tl

# What a loss is divided by: nothing; a number that is given, plus a constant; a sum over all
# segments, at least 1; a sum over its own segment, or 1 where that is not above 0; the second of
# two numbers that are given; a sum over its own segment, at least 1.
NOTHING: tl.constexpr = tl.constexpr(0)
DIVISOR: tl.constexpr = tl.constexpr(1)
SUM: tl.constexpr = tl.constexpr(2)
OWN_SUM: tl.constexpr = tl.constexpr(3)
SECOND: tl.constexpr = tl.constexpr(4)
OWN_SUM_OR_1: tl.constexpr = tl.constexpr(5)


@triton.jit
def sum_of(p_sums, start, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for done in range(0, n, BLOCK):
        column = done + tl.arange(0, BLOCK)
        total += tl.load(p_sums + start + column, mask=column < n, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def programs_of(segment, blocks, n_repeats, N_BLOCKS: tl.constexpr):
    """(first, number) of the programs of a segment: all have as many, or each its own."""
    start = segment * blocks[0] * n_repeats
    n = blocks[0] * n_repeats
    for i in tl.static_range(1, N_BLOCKS):
        if segment == i:
            n = blocks[i] * n_repeats
        if segment > i:
            start += (blocks[i] - blocks[0]) * n_repeats
    return start, n


@triton.jit(do_not_specialize=["n_repeats", "n_segments", "n_programs"])
def totals_kernel(
    p_sums, p_divisor, p_out, p_scale, blocks, divisor, s_divisor, n_repeats, n_segments,
    n_programs,
    TERMS: tl.constexpr, N_TERMS: tl.constexpr, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A loss of a segment per program, and the factor that its gradient takes.

    `p_sums` [sums, n_programs] has the losses first. TERMS[t] = (factor, kind of divisor, the
    number added to the divisor or the row of its sum). Without TERMS each program gives a plain
    sum.
    """
    pid = tl.program_id(0)
    term = pid // n_segments
    segment = pid - term * n_segments
    start, n = programs_of(segment, blocks, n_repeats, N_BLOCKS)
    total = sum_of(p_sums + term.to(tl.int64) * n_programs, start, n, BLOCK)
    if N_TERMS == 0:
        tl.store(p_out + pid, total)
    for t in tl.static_range(N_TERMS):
        if term == t:
            scale = tl.full([], TERMS[t][0], tl.float32)
            if TERMS[t][1] == DIVISOR:
                by = divisor
                if p_divisor is not None:
                    by = tl.load(p_divisor).to(tl.float32)
                scale = scale / (by + TERMS[t][2])
            elif TERMS[t][1] == SECOND:
                scale = scale / tl.load(p_divisor + s_divisor).to(tl.float32)
            elif TERMS[t][1] == SUM:
                row = p_sums + TERMS[t][2] * n_programs
                by = sum_of(row, 0, n_programs, BLOCK)
                scale = scale / tl.where(by < 1.0, 1.0, by)
            elif TERMS[t][1] == OWN_SUM:
                row = p_sums + TERMS[t][2] * n_programs
                by = sum_of(row, start, n, BLOCK)
                scale = scale / tl.where(by > 0.0, by, 1.0)
            elif TERMS[t][1] == OWN_SUM_OR_1:
                row = p_sums + TERMS[t][2] * n_programs
                by = sum_of(row, start, n, BLOCK)
                scale = scale / tl.where(by < 1.0, 1.0, by)
            tl.store(p_out + pid, total * scale)
            tl.store(p_scale + pid, scale)


@triton.jit
def sum_kernel(terms, p_out, N: tl.constexpr):
    """The sum of N numbers, each where it lies."""
    total = tl.load(terms[0]).to(tl.float32)
    for i in tl.static_range(1, N):
        total += tl.load(terms[i]).to(tl.float32)
    tl.store(p_out, total)
