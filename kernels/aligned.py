"""Every term of anchors matched to targets in one pass, all heads and levels in one launch.

Each level is a tuple of its tensors (pointer, strides...), with rows (image, anchor), or None. A
program takes BR anchors of one image and level. Nearly all of them have no target: a program
without any reads class logits only, and in backward writes zeros.
"""

import triton
import triton.language as tl

from .classes import class_rows
from .dense import put_sum, upstream_of
from .math import at_least, ciou_loss_and_grad, masked, times, two_bin_and_grad
from .rows import load, load_box, load_rows, row_pointers, store_box, tile_pointers


@triton.jit
def rows_of_side(tensor, side):
    """One side's rows of a tensor with strides from image, anchor, side and bin to the next."""
    return tensor[0] + side * tl.cast(tensor[3], tl.int64), tensor[1], tensor[2], tensor[4]


@triton.jit
def two_bins_and_grad(logits, at, distance, m_row, BINS: tl.constexpr):
    """Loss of rows of one side, and its gradient [BR, BK], of the bins beside a distance.

    BINS is (their number, the margin that keeps a distance off the last, BK).
    """
    BK: tl.constexpr = tl.constexpr(BINS[2])
    column = tl.arange(0, BK)
    m_column = (column < BINS[0])[None, :]
    distance, _ = at_least(distance, 0.0)
    last = BINS[0] - 1 - BINS[1]
    distance = tl.where(distance > last, last, distance)
    lower = tl.floor(distance)
    left = lower.to(tl.int32)
    m_row = m_row & (left >= 0) & (left < BINS[0])
    is_left = column[None, :] == left[:, None]
    is_right = column[None, :] == (left + 1)[:, None]
    of_right = tl.where(left + 1 < BINS[0], distance - lower, 0.0)
    x = load(tile_pointers(logits, at, column.to(tl.int64)), m_row[:, None] & m_column)
    x = tl.where(m_column, x, float("-inf"))
    of_left = 1.0 - (distance - lower)
    loss, dx = two_bin_and_grad(x, is_left, is_right, of_left[:, None], of_right[:, None])
    return tl.where(m_row, loss, 0.0), tl.where(m_row[:, None], dx, 0.0)


@triton.jit
def store_bins(tensor, at, value, m_row, BINS: tl.constexpr):
    BK: tl.constexpr = tl.constexpr(BINS[2])
    column = tl.arange(0, BK)
    p = tile_pointers(tensor, at, column.to(tl.int64))
    tl.store(p, value, mask=m_row[:, None] & (column < BINS[0])[None, :])


@triton.jit(do_not_specialize=["s_image", "n_images", "n_targets"])
def aligned_kernel(
    levels, p_out, dout, p_scale, sizes, target, score, anchors, targets,
    s_image, n_images, n_targets, n_classes,
    BINS: tl.constexpr, CIOU: tl.constexpr, N_HEADS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Classes, distributions and boxes, with which a program's sums begin; the last is of scores.

    `sizes` are the anchors of `levels`, those of a head after those of another. CIOU is what is
    added to denominators, and whether alpha is differentiated.
    """
    PER_HEAD: tl.constexpr = len(sizes) // N_HEADS
    BK: tl.constexpr = tl.constexpr(BINS[2])
    pid = tl.program_id(0)
    start = 0
    first = 0
    for i in tl.static_range(len(sizes)):
        if i % PER_HEAD == 0:
            first = 0
        n_blocks = tl.cdiv(sizes[i], BR)
        if (pid >= start) & (pid < start + n_images * n_blocks):
            logits, distributions, distances, dlogits, ddistributions, ddistances = levels[i]
            image = (pid - start) // n_blocks
            row = ((pid - start - image * n_blocks) * BR + tl.arange(0, BR)).to(tl.int64)
            image = image.to(tl.int64)
            at = (image, row)
            m_row = row < sizes[i]
            # Of all levels of a head, and heads after one another.
            at_anchor = (i // PER_HEAD * n_images + image, first + row)
            index = tl.load(row_pointers(target, at_anchor), mask=m_row, other=-1)
            exists = m_row & (index >= 0) & (index < n_targets)
            p_target = targets[0] + image * s_image + index.to(tl.int64) * targets[1]
            label = load(p_target, exists)
            m_object = exists & (label >= 0.0) & (label < n_classes)
            label = tl.where(m_object, label.to(tl.int32), -1)
            weight = load_rows(score, at_anchor, m_object, 0.0)

            class_weight = tl.full([BR], 1.0, tl.float32)
            if dout is not None:
                class_weight *= upstream_of(dout, p_scale, i // PER_HEAD)
            if (dout is None) or (dlogits is not None):
                total = class_rows(
                    (logits, dlogits, None), at, m_row, label, (weight, class_weight), n_classes,
                    ("bce",), BC,
                )  # fmt: skip
                if dout is None:
                    put_sum(p_out, 0, tl.where(m_row, total, 0.0))
                    put_sum(p_out, 3, weight)

            m_object = m_object & (weight != 0.0)
            if tl.max(m_object.to(tl.int32), axis=0) > 0:
                p_centre = row_pointers((anchors[0][0], 0, anchors[0][1]), at_anchor)
                s_centre = tl.cast(anchors[0][2], tl.int64)
                p_stride = row_pointers((anchors[1][0], 0, anchors[1][1]), at_anchor)
                stride = tl.where(m_object, load(p_stride, m_object), 1.0)
                p_target += targets[2]
                s_target = tl.cast(targets[2], tl.int64)
                if (dout is None) or (ddistances is not None):
                    x = load(p_centre, m_object) / stride
                    y = load(p_centre + s_centre, m_object) / stride
                    left, top, right, bottom = load_box(distances, at, m_object)
                    box = (x - left, y - top, x + right, y + bottom)
                    x1 = load(p_target, m_object) / stride
                    y1 = load(p_target + s_target, m_object) / stride
                    x2 = load(p_target + 2 * s_target, m_object) / stride
                    y2 = load(p_target + 3 * s_target, m_object) / stride
                    loss, by_box, _ = ciou_loss_and_grad(box, (x1, y1, x2, y2), CIOU[0], CIOU[1])
                    if dout is None:
                        put_sum(p_out, 2, tl.where(m_object, weight * loss, 0.0))
                    else:
                        up = weight * upstream_of(dout, p_scale, 2 * N_HEADS + i // PER_HEAD)
                        dx1, dy1, dx2, dy2 = masked(times(by_box, up), m_object)
                        store_box(ddistances, at, (-dx1, -dy1, dx2, dy2), m_row)
                if (dout is None) or (ddistributions is not None):
                    up = weight * 0.25
                    if dout is not None:
                        up *= upstream_of(dout, p_scale, N_HEADS + i // PER_HEAD)
                    total = tl.zeros([BR], tl.float32)
                    for side in range(4):
                        centre = load(p_centre + side % 2 * s_centre, m_object) / stride
                        edge = load(p_target + side * s_target, m_object) / stride
                        distance = tl.where(side < 2, centre - edge, edge - centre)
                        of_side = rows_of_side(distributions, side)
                        loss, dx = two_bins_and_grad(of_side, at, distance, m_object, BINS)
                        total += loss
                        if dout is not None:
                            dx = tl.where(m_object[:, None], up[:, None] * dx, 0.0)
                            store_bins(rows_of_side(ddistributions, side), at, dx, m_row, BINS)
                    if dout is None:
                        put_sum(p_out, 1, tl.where(m_object, up * total, 0.0))
            elif dout is None:
                put_sum(p_out, 1, tl.zeros([BR], tl.float32))
                put_sum(p_out, 2, tl.zeros([BR], tl.float32))
            else:
                zero = tl.zeros([BR], tl.float32)
                if ddistances is not None:
                    store_box(ddistances, at, (zero, zero, zero, zero), m_row)
                if ddistributions is not None:
                    zeros = tl.zeros([BR, BK], tl.float32)
                    for side in range(4):
                        store_bins(rows_of_side(ddistributions, side), at, zeros, m_row, BINS)
        start += n_images * n_blocks
        first += sizes[i]
