"""Ragged targets as padded tensors, and which target each denoising query has. No gradients.

Rows of all images lie one after the other, and an image's begin where those of the images before it
end. Whatever the counts say, nothing is read beyond the last row.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_image(p_counts, b, most, BI: tl.constexpr):
    """(rows before those of image b, its own), of `most` an image; all have `most` without counts.

    BI images are counted at a time.
    """
    before = b * most
    n = b * 0 + most
    if p_counts is not None:
        before = b * 0
        for start in range(0, b, BI):
            image = start + tl.arange(0, BI)
            before += tl.sum(clamped(tl.load(p_counts + image, mask=image < b, other=0), most))
        n = clamped(tl.load(p_counts + b), most)
    return before, n


@triton.jit
def clamped(count, most):
    count = count.to(tl.int64)
    return tl.where(count < 0, 0, tl.where(count > most, most, count))


@triton.jit(do_not_specialize=["n_targets", "n_boxes", "n_blocks"])
def pad_kernel(
    p_counts, p_labels, p_boxes, p_padded_labels, p_padded_boxes, n_targets, n_boxes, n_blocks,
    BI: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT places of an image: its labels and boxes, then -1 and 0."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // n_blocks
    t = (pid - b * n_blocks) * BT + tl.arange(0, BT)
    m_target = t < n_targets
    before, n = rows_of_image(p_counts, b, n_targets, BI)
    row = before + t
    place = b * n_targets + t
    m_row = (t < n) & (row < n_boxes)
    label = tl.load(p_labels + row, mask=m_row, other=-1)
    tl.store(p_padded_labels + place, label, mask=m_target)
    side = tl.arange(0, 4)[None, :]
    box = tl.load(p_boxes + row[:, None] * 4 + side, mask=m_row[:, None], other=0.0)  # [BT, 4]
    tl.store(p_padded_boxes + place[:, None] * 4 + side, box, mask=m_target[:, None])


@triton.jit(do_not_specialize=["n_positives", "n_groups", "n_targets", "n_queries", "n_blocks"])
def denoising_kernel(
    p_positives, p_counts, p_target, n_positives, n_groups, n_targets, n_queries, n_blocks,
    BI: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BQ queries of an image: the place of each among the image's positives, BP of them at a time.

    A query that is there twice, which no model makes, has the last of its targets.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // n_blocks
    query = (pid - b * n_blocks) * BQ + tl.arange(0, BQ)
    before, n = rows_of_image(p_counts, b, n_targets, BI)
    first = before * n_groups
    place = tl.full([BQ], -1, tl.int64)
    for start in range(0, n * n_groups, BP):
        local = start + tl.arange(0, BP)
        m_positive = (local < n * n_groups) & (first + local < n_positives)
        positive = tl.load(p_positives + first + local, mask=m_positive, other=-1).to(tl.int64)
        is_query = query[:, None] == positive[None, :]  # [BQ, BP]
        found = tl.max(tl.where(is_query, local[None, :], -1), axis=1)
        place = tl.where(found > place, found, place)
    target = tl.where(place >= 0, place % tl.where(n > 0, n, 1), -1)
    tl.store(p_target + b * n_queries + query, target, mask=query < n_queries)
