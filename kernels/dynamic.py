"""Assignment by least cost, of as many anchors as overlaps add up to, in four launches.

A tensor is a tuple (pointer, strides...). COST is (name, radius, weight of the IoU, weight of the
class, what is added to the IoU in its logarithm, the least logarithm, the largest cost, the power
of a soft label's distance); BID what a bid adds to an anchor, beside the index of its target.
"""

import math

import triton
import triton.language as tl

from .assigning import HIGHEST, INDEX, block_of, iou, load_target, packed, tell, value_of
from .math import logistic, quality_focal_and_grad, quality_focal_background
from .rows import load, load_box

LN_10: tl.constexpr = tl.constexpr(math.log(10))
# Costs are ranked by their bits; where an anchor is inside a target and near its centre, before all
# others; and what is no candidate, never.
FIRST: tl.constexpr = tl.constexpr(-(2**31))
NEVER: tl.constexpr = tl.constexpr(2**31 - 1)

_COUNTS = ["n_targets", "n_anchors", "n_classes", "n_blocks"]


@triton.jit
def inside(point, box):
    x, y, _, _ = point
    return (x > box[0]) & (y > box[1]) & (x < box[2]) & (y < box[3])


@triton.jit
def from_centre(point, box):
    return point[0] - (box[0] + box[2]) * 0.5, point[1] - (box[1] + box[3]) * 0.5


@triton.jit
def near(point, box, RADIUS: tl.constexpr):
    x, y = from_centre(point, box)
    return (tl.abs(x) < RADIUS * point[2]) & (tl.abs(y) < RADIUS * point[3])


@triton.jit
def log_from(p, LOWEST: tl.constexpr):
    """The logarithm, of 0 the lowest; a NaN stays one."""
    value = tl.log(p)
    return tl.where(value < LOWEST, LOWEST, value)


@triton.jit
def probability(x, o):
    """Geometric mean of the class's and the object's, or that of the class alone."""
    _, p, _ = logistic(x)
    if o is not None:
        _, q, _ = logistic(o)
        p = tl.sqrt(p * q)
    return p


@triton.jit
def elsewhere_cost(x, o, COST: tl.constexpr):
    """The class cost of a logit as if it were not at the label."""
    if COST[0] == "soft_label":
        cost, _ = quality_focal_background(x, COST[7])
    else:
        cost = -log_from(1.0 - probability(x, o), COST[5])
    return cost


@triton.jit
def label_cost(x, o, overlap, COST: tl.constexpr):
    """What a logit costs more at the label than elsewhere."""
    if COST[0] == "soft_label":
        cost, _ = quality_focal_and_grad(x, overlap, COST[7])
    else:
        cost = -log_from(probability(x, o), COST[5])
    return cost - elsewhere_cost(x, o, COST)


@triton.jit(do_not_specialize=_COUNTS)
def candidates_kernel(
    logits, objectness, points, targets, p_elsewhere, p_bids,
    n_targets, n_anchors, n_classes, n_blocks,
    COST: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BA anchors of an image: candidates' class cost as if no class was the label, else -1."""
    b, _, anchor = block_of(n_blocks, BA)
    m_anchor = anchor < n_anchors
    point = load_box((points[0], 0, points[1], points[2]), (0, anchor), m_anchor)
    is_candidate = anchor < 0
    for t in range(n_targets):
        is_real, label, box = load_target(targets, n_targets, b, t)
        if is_real & (label < n_classes):
            is_candidate |= inside(point, box)
            if COST[0] == "simota":
                is_candidate |= near(point, box, COST[1])
    is_candidate &= m_anchor
    total = tl.zeros([BA], tl.float32)
    if tl.max(is_candidate.to(tl.int32), axis=0) > 0:
        o = None
        if objectness is not None:
            o = load(objectness[0] + b * objectness[1] + anchor * objectness[2], is_candidate)
            o = o[:, None]
        p_logits = logits[0] + b * logits[1] + anchor * logits[2]
        for start in range(0, n_classes, BC):
            column = (start + tl.arange(0, BC)).to(tl.int64)
            mask = is_candidate[:, None] & (column < n_classes)[None, :]
            x = load(p_logits[:, None] + (column * logits[3])[None, :], mask)
            total += tl.sum(tl.where(mask, elsewhere_cost(x, o, COST), 0.0), axis=1)
    row = b * n_anchors + anchor
    tl.store(p_elsewhere + row, tl.where(is_candidate, total, -1.0), mask=m_anchor)
    tl.store(p_bids + row, anchor * 0, mask=m_anchor)


@triton.jit(do_not_specialize=_COUNTS)
def costs_kernel(
    logits, objectness, boxes, points, targets, p_elsewhere, p_rank, p_overlap,
    n_targets, n_anchors, n_classes, n_blocks,
    COST: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """BT targets against BA anchors: ranks of costs, and overlaps. EPS is the IoU's."""
    row, _, anchor = block_of(n_blocks, BA)
    b = row // tl.cdiv(n_targets, BT)
    first_target = (row - b * tl.cdiv(n_targets, BT)) * BT
    m_anchor = anchor < n_anchors
    elsewhere = tl.load(p_elsewhere + b * n_anchors + anchor, mask=m_anchor, other=-1.0)
    # A NaN is no less than 0.
    is_candidate = m_anchor & ~(elsewhere < 0.0)
    point = load_box((points[0], 0, points[1], points[2]), (0, anchor), m_anchor)
    p = load_box(boxes, (b, anchor), is_candidate)
    o = None
    if objectness is not None:
        o = load(objectness[0] + b * objectness[1] + anchor * objectness[2], is_candidate)
    p_logits = logits[0] + b * logits[1] + anchor * logits[2]
    for t in range(first_target, tl.minimum(first_target + BT, n_targets)):
        is_real, label, box = load_target(targets, n_targets, b, t)
        if is_real & (label < n_classes):
            overlap = iou(p, box, EPS)
            x = load(p_logits + label * logits[3], is_candidate)
            cost = COST[3] * (elsewhere + label_cost(x, o, overlap, COST))
            cost -= COST[2] * tl.log(overlap + COST[4])
            if COST[0] == "soft_label":
                dx, dy = from_centre(point, box)
                stride = tl.where(m_anchor, point[2], 1.0)
                distance = tl.sqrt(dx * dx + dy * dy) / stride
                cost += tl.exp((distance - COST[1]) * LN_10)
            cost = tl.where(cost < COST[6], tl.where(cost > 0.0, cost, 0.0), COST[6])
            rank = cost.to(tl.int32, bitcast=True)
            if COST[0] == "simota":
                is_first = inside(point, box) & near(point, box, COST[1])
                rank = tl.where(is_first, rank + FIRST, rank)
            pair = (b * n_targets + t) * n_anchors + anchor
            tl.store(p_rank + pair, tl.where(is_candidate, rank, NEVER), mask=m_anchor)
            tl.store(p_overlap + pair, tl.where(is_candidate, overlap, 0.0), mask=m_anchor)


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "n_classes", "topk"])
def bids_kernel(
    targets, p_rank, p_overlap, p_bids, n_targets, n_anchors, n_classes, topk,
    BID: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The bids of a target: how many, its overlaps say, and for what, its costs.

    One after the other, each time the next, in blocks of BA anchors that the cache holds.
    """
    pair = tl.program_id(0).to(tl.int64)
    b = pair // n_targets
    t = pair - b * n_targets
    is_real, label, _ = load_target(targets, n_targets, b, t)
    if is_real & (label < n_classes):
        total = tl.full([], 0.0, tl.float32)
        last = tl.full([], HIGHEST, tl.int64)
        n_added = tl.full([], 0, tl.int32)
        while (n_added < topk) & (last > 0):
            largest = tl.zeros([BA], tl.int64)
            for start in range(0, n_anchors, BA):
                anchor = start + tl.arange(0, BA)
                m_anchor = anchor < n_anchors
                overlap = load(p_overlap + pair * n_anchors + anchor, m_anchor)
                key = packed(overlap, anchor)
                is_next = (overlap > 0.0) & (key < last) & (key > largest)
                largest = tl.where(is_next, key, largest)
            last = tl.max(largest, axis=0)
            total += value_of(last)
            n_added += 1

        k = tl.maximum(total.to(tl.int32), 1)
        last = tl.full([], -HIGHEST, tl.int64)
        n_bids = tl.full([], 0, tl.int32)
        while (n_bids < k) & (last < HIGHEST):
            lowest = tl.full([BA], HIGHEST, tl.int64)
            for start in range(0, n_anchors, BA):
                anchor = start + tl.arange(0, BA)
                m_anchor = anchor < n_anchors
                rank = tl.load(p_rank + pair * n_anchors + anchor, mask=m_anchor, other=NEVER)
                key = packed(rank, anchor)
                is_next = (rank != NEVER) & (key > last) & (key < lowest)
                lowest = tl.where(is_next, key, lowest)
            last = tl.min(lowest, axis=0)
            if last < HIGHEST:
                tl.atomic_add(p_bids + b * n_anchors + (last & INDEX), BID + t, sem="relaxed")
            n_bids += 1


@triton.jit(do_not_specialize=_COUNTS)
def winners_kernel(
    boxes, targets, p_rank, p_bids, told, n_targets, n_anchors, n_classes, n_blocks,
    BID: tl.constexpr, EPS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """What BA anchors of an image got: the one that bid, or of several the cheapest of all."""
    b, _, anchor = block_of(n_blocks, BA)
    m_anchor = anchor < n_anchors
    row = b * n_anchors + anchor
    bids = tl.load(p_bids + row, mask=m_anchor, other=0)
    target = tl.where(bids > 0, bids & INDEX, -1)
    has_several = bids >= 2 * BID
    if tl.max(has_several.to(tl.int32), axis=0) > 0:
        cheapest = tl.full([BA], HIGHEST, tl.int64)
        for t in range(n_targets):
            is_real, label, box = load_target(targets, n_targets, b, t)
            if is_real & (label < n_classes):
                p_pair = p_rank + (b * n_targets + t) * n_anchors + anchor
                key = packed(tl.load(p_pair, mask=has_several, other=NEVER), t)
                cheapest = tl.where(key < cheapest, key, cheapest)
        target = tl.where(has_several, cheapest & INDEX, target)
    box = load_box(boxes, (b, anchor), m_anchor & (target >= 0))
    tell(told, target, box, targets, b * n_targets, row, m_anchor, EPS)
