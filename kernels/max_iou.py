"""Assignment by largest overlap in two launches. No gradients.

Anchors are a tuple (pointer, strides), and so is which are inside; the boxes to ignore are a tuple
as targets are. Of a target the largest overlap is an integer of its bits and, below, the anchor, of
which the first is the largest; 0 is none.
"""

import triton
import triton.language as tl

from .assigning import INDEX, block_of, iou, load_target, packed, tell, value_of
from .math import at_least, overlap_1d, size, xs, ys
from .rows import load_box

_COUNTS = ["n_targets", "n_crowd", "n_anchors", "n_blocks"]


@triton.jit
def part_inside(p, t, EPS: tl.constexpr):
    """The part of the area of p that lies in t."""
    w, _, _ = overlap_1d(xs(p), xs(t))
    h, _, _ = overlap_1d(ys(p), ys(t))
    p_w, p_h = size(p)
    area, _ = at_least(p_w * p_h, EPS)
    return w * h / area


@triton.jit
def may_not(at, inside, crowd, n_crowd, b, anchor, IGNORE: tl.constexpr, EPS: tl.constexpr):
    """Which anchors may not be assigned: more than IGNORE of them lies in a box to ignore."""
    is_out = anchor < 0
    if inside is not None:
        is_out = tl.load(inside[0] + anchor * inside[1]) == 0
    if crowd is not None:
        for i in range(n_crowd):
            is_real, _, box = load_target(crowd, n_crowd, b, i)
            if is_real:
                is_out |= part_inside(at, box, EPS) > IGNORE
    return is_out


@triton.jit(do_not_specialize=_COUNTS)
def overlaps_kernel(
    anchors, inside, targets, crowd, p_ratio, p_highest, n_targets, n_crowd, n_anchors, n_blocks,
    IGNORE: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """BT targets against BA anchors: IoUs, -1 where one may not be assigned; and the largest."""
    row, _, anchor = block_of(n_blocks, BA)
    b = row // tl.cdiv(n_targets, BT)
    first_target = (row - b * tl.cdiv(n_targets, BT)) * BT
    m_anchor = anchor < n_anchors
    # Beyond the last anchor the last again, whose largest overlap is counted once more.
    anchor = tl.minimum(anchor, n_anchors - 1)
    at = load_box((anchors[0], 0, anchors[1], anchors[2]), (0, anchor), None)
    is_out = may_not(at, inside, crowd, n_crowd, b, anchor, IGNORE, EPS)
    for t in range(first_target, tl.minimum(first_target + BT, n_targets)):
        is_real, _, box = load_target(targets, n_targets, b, t)
        if is_real:
            ratio = iou(at, box, EPS)
            pair = b * n_targets + t
            p_pair = p_ratio + pair * n_anchors + anchor
            tl.store(p_pair, tl.where(is_out, -1.0, ratio), mask=m_anchor)
            key = tl.max(tl.where(is_out, 0, packed(ratio, INDEX - anchor)), axis=0)
            tl.atomic_max(p_highest + pair, key, sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)
def winners_kernel(
    anchors, inside, targets, crowd, p_ratio, p_highest, told, p_ignored,
    n_targets, n_crowd, n_anchors, n_blocks,
    THRESHOLDS: tl.constexpr, ALL: tl.constexpr, IGNORE: tl.constexpr, EPS: tl.constexpr,
    BA: tl.constexpr,
):  # fmt: skip
    """What BA anchors of an image got. THRESHOLDS: positive, negative from and below, of targets.

    ALL: whether each anchor of a target's largest IoU gets it, or the first.
    """
    b, _, anchor = block_of(n_blocks, BA)
    m_anchor = anchor < n_anchors
    row = b * n_anchors + anchor
    index = tl.minimum(anchor, n_anchors - 1)
    at = load_box((anchors[0], 0, anchors[1], anchors[2]), (0, index), None)
    most = tl.full([BA], -1.0, tl.float32)
    which = anchor * 0 - 1
    taken = anchor * 0 - 1
    n_real = 0
    for t in range(n_targets):
        pair = b * n_targets + t
        if load_target(targets, n_targets, b, t)[0]:
            n_real += 1
            ratio = tl.load(p_ratio + pair * n_anchors + anchor, mask=m_anchor, other=-1.0)
            which = tl.where(ratio > most, t, which)
            most = tl.where(ratio > most, ratio, most)
            key = tl.load(p_highest + pair)
            highest = value_of(key)
            if (key > 0) & (highest >= THRESHOLDS[3]):
                if ALL:
                    is_taken = ratio == highest
                else:
                    is_taken = (key & INDEX) + anchor == INDEX
                taken = tl.where(is_taken, t, taken)
    target = tl.where(taken >= 0, taken, tl.where(most >= THRESHOLDS[0], which, -1))
    tell(told, target, at, targets, b * n_targets, row, m_anchor, EPS)
    is_background = ((most >= THRESHOLDS[1]) & (most < THRESHOLDS[2])) | (n_real == 0)
    is_out = may_not(at, inside, crowd, n_crowd, b, index, IGNORE, EPS)
    tl.store(p_ignored + row, (target < 0) & (is_out | ~is_background), mask=m_anchor)
