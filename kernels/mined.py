"""SSD's losses: softmax cross-entropy of positives and of mined negatives, smooth L1 of box sides.

`mined_kernel` takes BR anchors of one image a program, in both passes; between them
`mining_kernel`, an image a program, says which negatives count.
"""

import triton
import triton.language as tl

from .boxes import distance_and_grad
from .dense import by_code, decoded, put_sum, upstream_of
from .math import delta_encode, masked, times, two_bin_and_grad
from .rows import load, load_box, load_rows, row_pointers, store_box, tile_pointers
from .selection import kth_largest, largest, load_keys
from .totals import sum_of


@triton.jit
def weighted(x, weight):
    """Whatever a side of weight 0 holds, it adds nothing."""
    return tl.where(weight != 0.0, weight * x, 0.0)


@triton.jit
def sides_and_grad(p, t, weights, LOSS: tl.constexpr):
    """Weighted loss and gradient by p of a pair of boxes, each side with a weight of its own."""
    x1, dx1 = distance_and_grad(p[0] - t[0], LOSS)
    y1, dy1 = distance_and_grad(p[1] - t[1], LOSS)
    x2, dx2 = distance_and_grad(p[2] - t[2], LOSS)
    y2, dy2 = distance_and_grad(p[3] - t[3], LOSS)
    loss = weighted(x1, weights[0]) + weighted(y1, weights[1])
    loss += weighted(x2, weights[2]) + weighted(y2, weights[3])
    gradient = (
        weighted(dx1, weights[0]),
        weighted(dy1, weights[1]),
        weighted(dx2, weights[2]),
        weighted(dy2, weights[3]),
    )
    return loss, gradient


@triton.jit
def of_shape(tensor, shape):
    """One shape's rows of a level's tensor, which lies (image, shape, position, feature)."""
    return tensor[0] + shape.to(tl.int64) * tensor[2], tensor[1], tensor[3], tensor[4]


@triton.jit(do_not_specialize=["n_anchors", "n_blocks"])
def mined_kernel(
    levels, rows, p_hardness, p_sums, dout, p_found, sizes, n_anchors, n_blocks, n_features,
    SHAPES: tl.constexpr, SIDES: tl.constexpr, CODE: tl.constexpr, N_LEVELS: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Forward: how hard each negative is, and sums of a program. Backward: gradients.

    A level has so many positions (sizes) and anchors at each (SHAPES); of what has rows
    [images, n_anchors] those of a shape follow those of another.
    Hardness [images, n_anchors] is -inf of what is no negative. Sums: losses of positive rows,
    their number, losses of boxes. Found: the factor of each loss, then for each row 1 if it was
    mined.
    """
    labels, weights, anchors, targets, box_weights = rows
    n_images = tl.num_programs(0) // n_blocks
    image = tl.program_id(0) // n_blocks
    block = tl.program_id(0) - image * n_blocks
    start = 0
    first = 0
    for i in tl.static_range(N_LEVELS):
        n_each = tl.cdiv(sizes[i], BR)
        if (block >= start) & (block < start + SHAPES[i] * n_each):
            scores, codes, dscores, dcodes = levels[i]
            shape = block * 0
            if SHAPES[i] > 1:
                shape = (block - start) // n_each
            row = (block - start - shape * n_each) * BR + tl.arange(0, BR)
            m_row = row < sizes[i]
            anchor_row = (first + shape * sizes[i] + row).to(tl.int64)
            at = (image.to(tl.int64), row.to(tl.int64))
            at_anchor = (image.to(tl.int64), anchor_row)
            o_anchor = image.to(tl.int64) * n_anchors + anchor_row
            index = tl.load(row_pointers(labels, at_anchor), mask=m_row, other=-1)
            m_positive = m_row & (index >= 0) & (index < n_features - 1)
            m_negative = m_row & (index == n_features - 1)
            if (dout is None) or (dcodes is not None):
                if CODE[0] == "targets":
                    target = load_box(targets, at_anchor, m_row)
                    m_box = (target[2] > target[0]) & (target[3] > target[1])
                    one = tl.where(m_box, 1.0, 0.0)
                    sides = (one, one, one, one)
                    anchor = load_box(anchors, at_anchor, m_box)
                    target = delta_encode(target, anchor, CODE)
                else:
                    sides = load_box(box_weights, at_anchor, m_row)
                    m_box = (sides[0] != 0.0) | (sides[1] != 0.0)
                    m_box |= (sides[2] != 0.0) | (sides[3] != 0.0)
                    target = load_box(targets, at_anchor, m_box)
                    anchor = target
                    if CODE[0] != "":
                        anchor = load_box(anchors, at_anchor, m_box)
                code = load_box(of_shape(codes, shape), at, m_box)
                box, slopes = decoded(code, anchor, CODE)
                loss, by_box = sides_and_grad(box, target, sides, SIDES)
                if dout is None:
                    put_sum(p_sums, 2, loss)
                else:
                    by_box = times(by_box, upstream_of(dout, p_found, n_images + image))
                    by_box = masked(by_code(by_box, slopes, CODE), m_box)
                    store_box(of_shape(dcodes, shape), at, by_box, m_row)
            if (dout is None) or (dscores is not None):
                weight = load_rows(weights, at_anchor, m_row, 1.0)
                m_counts = m_positive | m_negative
                if dout is not None:
                    p_mined = p_found + 2 * n_images + o_anchor
                    is_mined = tl.load(p_mined, mask=m_negative, other=0.0)
                    m_counts = m_positive | (is_mined != 0.0)
                # Whatever a row of weight 0 holds, it adds nothing.
                m_used = m_counts & (weight != 0.0)
                column = tl.arange(0, BK)
                m_column = (column < n_features)[None, :]
                is_label = column[None, :] == tl.where(m_used, index.to(tl.int32), -1)[:, None]
                column = column.to(tl.int64)
                p_scores = tile_pointers(of_shape(scores, shape), at, column)
                x = load(p_scores, m_used[:, None] & m_column)
                x = tl.where(m_column, x, float("-inf"))
                loss, dx = two_bin_and_grad(x, is_label, is_label, 1.0, 0.0)
                if dout is None:
                    loss = tl.where(m_used, weight * loss, 0.0)
                    hardness = tl.where(m_negative, loss, float("-inf"))
                    tl.store(p_hardness + o_anchor, hardness, mask=m_row)
                    put_sum(p_sums, 0, tl.where(m_positive, loss, 0.0))
                    put_sum(p_sums, 1, tl.where(m_positive, 1.0, 0.0))
                else:
                    scale = weight * upstream_of(dout, p_found, image)
                    dx = tl.where(m_used[:, None], scale[:, None] * dx, 0.0)
                    p_dscores = tile_pointers(of_shape(dscores, shape), at, column)
                    tl.store(p_dscores, dx, mask=m_row[:, None] & m_column)
        start += SHAPES[i] * n_each
        first += SHAPES[i] * sizes[i]


@triton.jit(do_not_specialize=["ratio", "n_rows", "n_blocks"])
def mining_kernel(
    p_hardness, p_sums, p_divisor, p_out, p_found, divisor, ratio, n_rows, n_blocks,
    EPS: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The losses of an image: its classes', then after those of all images its boxes'.

    The divisor, 1 in the place of 0, has EPS added for boxes. `ratio` negatives a positive count.
    """
    image = tl.program_id(0)
    n_images = tl.num_programs(0)
    n_programs = n_images.to(tl.int64) * n_blocks
    first = image.to(tl.int64) * n_blocks
    classes = sum_of(p_sums, first, n_blocks, BLOCK)
    n_positive = sum_of(p_sums + n_programs, first, n_blocks, BLOCK)
    boxes = sum_of(p_sums + 2 * n_programs, first, n_blocks, BLOCK)
    k = n_positive.to(tl.int64) * ratio
    k = tl.where(k < n_rows, k, n_rows).to(tl.int32)

    row = image.to(tl.int64)
    x = (p_hardness, n_rows, 1)
    p_hardness += row * n_rows
    p_mined = p_found + 2 * n_images + row * n_rows
    least, n_left = kth_largest(x, row, k, n_rows, BC)
    negatives = tl.zeros([BC], tl.float32)
    for start in range(0, n_rows, BC):
        column = start + tl.arange(0, BC)
        m_column = column < n_rows
        key = load_keys(x, row, column, m_column)
        taken, n_left = largest(key, m_column, k, least, n_left)
        loss = tl.load(p_hardness + column, mask=m_column, other=float("-inf"))
        taken = taken & (loss != float("-inf"))
        negatives += tl.where(taken, loss, 0.0)
        tl.store(p_mined + column, tl.where(taken, 1.0, 0.0), mask=m_column)

    by = divisor
    if p_divisor is not None:
        by = tl.load(p_divisor).to(tl.float32)
    by = tl.where(by == 0.0, 1.0, by)
    tl.store(p_out + image, (classes + tl.sum(negatives, axis=0)) / by)
    tl.store(p_found + image, 1.0 / by)
    tl.store(p_out + n_images + image, boxes / (by + EPS))
    tl.store(p_found + n_images + image, 1.0 / (by + EPS))
