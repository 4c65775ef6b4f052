"""Adaptive training sample selection in two launches. No gradients.

Anchors are a tuple (pointer, strides), level by level. An anchor's bids are integers of the IoU's
bits and, below, the target, of which the first is the largest; 0 is none.
"""

import triton
import triton.language as tl

from .assigning import HIGHEST, INDEX, block_of, iou, load_target, packed, tell
from .rows import load_box


@triton.jit
def centre(box):
    return (box[0] + box[2]) * 0.5, (box[1] + box[3]) * 0.5


@triton.jit
def threshold(overlap, is_used, n):
    """Mean plus standard deviation of the n entries that are used, of which the first is one."""
    # From one of them on, so that of equal ones the mean is that, and the deviation 0.
    first = tl.sum(tl.where(tl.arange(0, overlap.shape[0]) == 0, overlap, 0.0), axis=0)
    shifted = tl.where(is_used, overlap - first, 0.0)
    total = tl.sum(shifted, axis=0)
    variance = (tl.sum(shifted * shifted, axis=0) - total * total / n) / (n - 1.0)
    # A maximum would skip the NaN of a single entry.
    return first + total / n + tl.sqrt(tl.where(variance < 0.0, 0.0, variance))


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "topk"])
def bids_kernel(
    anchors, inside, sizes, targets, p_bids, n_targets, n_anchors, topk,
    EPS: tl.constexpr, MARGIN: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The candidates of a target, topk of each level, and its bids. EPS is the IoU's.

    One after the other, each time the next nearest, in blocks of BA that the cache holds.
    """
    pair = tl.program_id(0).to(tl.int64)
    b = pair // n_targets
    t = pair - b * n_targets
    is_real, _, box = load_target(targets, n_targets, b, t)
    if is_real:
        x, y = centre(box)
        slot = tl.arange(0, BK)
        candidate = slot.to(tl.int64) * 0 - 1
        n_found = tl.full([], 0, tl.int32)
        n_before = 0
        for i in tl.static_range(len(sizes)):
            last = tl.full([], -1, tl.int64)
            n_here = tl.full([], 0, tl.int32)
            while (n_here < topk) & (last < HIGHEST):
                nearest = tl.full([BA], HIGHEST, tl.int64)
                for start in range(0, sizes[i], BA):
                    place = start + tl.arange(0, BA)
                    mask = place < sizes[i]
                    anchor = (n_before + place).to(tl.int64)
                    if inside is not None:
                        mask &= tl.load(inside[0] + anchor * inside[1], mask=mask, other=0) != 0
                    at = load_box((anchors[0], 0, anchors[1], anchors[2]), (0, anchor), mask)
                    at_x, at_y = centre(at)
                    distance = (at_x - x) * (at_x - x) + (at_y - y) * (at_y - y)
                    key = packed(distance, anchor)
                    is_next = mask & (distance < float("inf")) & (key > last) & (key < nearest)
                    nearest = tl.where(is_next, key, nearest)
                last = tl.min(nearest, axis=0)
                is_here = last < HIGHEST
                candidate = tl.where((slot == n_found) & is_here, last & INDEX, candidate)
                n_found += is_here.to(tl.int32)
                n_here += 1
            n_before += sizes[i]
        is_used = candidate >= 0
        at = load_box((anchors[0], 0, anchors[1], anchors[2]), (0, candidate), is_used)
        overlap = tl.where(is_used, iou(at, box, EPS), 0.0)
        at_x, at_y = centre(at)
        is_bid = is_used & (overlap >= threshold(overlap, is_used, n_found.to(tl.float32)))
        is_bid &= (at_x - box[0] > MARGIN) & (at_y - box[1] > MARGIN)
        is_bid &= (box[2] - at_x > MARGIN) & (box[3] - at_y > MARGIN)
        p_bid = p_bids + b * n_anchors + candidate
        tl.atomic_max(p_bid, packed(overlap, INDEX - t), mask=is_bid, sem="relaxed")


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "n_blocks"])
def winners_kernel(
    anchors, targets, p_bids, told, n_targets, n_anchors, n_blocks,
    EPS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """What BA anchors of an image got: the largest bid."""
    b, _, anchor = block_of(n_blocks, BA)
    m_anchor = anchor < n_anchors
    row = b * n_anchors + anchor
    bid = tl.load(p_bids + row, mask=m_anchor, other=0)
    target = tl.where(bid > 0, INDEX - (bid & INDEX), -1)
    at = load_box((anchors[0], 0, anchors[1], anchors[2]), (0, anchor), m_anchor)
    tell(told, target, at, targets, b * n_targets, row, m_anchor, EPS)
