"""Task-aligned matching: which target each anchor gets, in three launches. No gradients.

Anchors lie in levels, each a tensor of its own: a tuple of tuples (pointer, image, feature, anchor
stride), heads one after the other, where `sizes` are the anchors of a head's levels. Heads and
images together are problems: problem = head * n_images + image.

An anchor that several targets keep takes the largest of their keys, integers that have no ties: the
metric's bits above, below them the target, the first of equals being the largest.

With rules "yolo" it is the IoU's bits; and what a target keeps is written down, since its scores
depend on what it then gets.
"""

import triton
import triton.language as tl

from .math import aspect_and_grad, centre_and_grad, iou_and_grad, logistic, power, size
from .rows import load

# Of a key, what is below the metric's bits.
LOW: tl.constexpr = tl.constexpr(2**31 - 1)
# The metric's bits: a NaN is above all, and whatever keeps it nobody gets.
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
NAN: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def similarity(p, t, IOU: tl.constexpr, EPS: tl.constexpr):
    """IoU, DIoU or CIoU, EPS added to the denominators."""
    iou, _, _, _, _ = iou_and_grad(p, t, EPS, True)
    value = iou
    if IOU != "iou":
        ratio, _, _ = centre_and_grad(p, t, EPS)
        value = iou - ratio
    if IOU == "ciou":
        aspect, _, _, _ = aspect_and_grad(size(p), size(t), iou, EPS, False)
        value = value - aspect
    return value


@triton.jit
def clamped_similarity(box, target, METRIC: tl.constexpr):
    """In [0, 1], or NaN."""
    IOU: tl.constexpr = tl.constexpr(METRIC[0])
    score = similarity(box, target, IOU, METRIC[1])
    return tl.where(score < 0.0, 0.0, tl.where(score > 1.0, 1.0, score))


@triton.jit
def bits_of(metric):
    """Of equal order, as integers; a NaN is the largest."""
    return tl.where(metric != metric, NAN, metric.to(tl.int32, bitcast=True))


@triton.jit
def find_level(block, sizes, BA: tl.constexpr):
    """(level, its size, its first anchor, the block's first within it): BA anchors of one level."""
    level = block * 0
    n = block * 0
    start = block * 0
    first = block * 0
    n_blocks = 0
    n_anchors = 0
    for i in tl.static_range(len(sizes)):
        is_here = block >= n_blocks
        level = tl.where(is_here, i, level)
        n = tl.where(is_here, sizes[i], n)
        start = tl.where(is_here, n_anchors, start)
        first = tl.where(is_here, (block - n_blocks) * BA, first)
        n_blocks += (sizes[i] + BA - 1) // BA
        n_anchors += sizes[i]
    return level, n, start, first


@triton.jit
def level_pointers(levels, which, b, anchor):
    """(pointers to the first feature of a level's anchors, the stride to the next)."""
    x = levels[0]
    pointers = x[0] + b * x[1] + anchor * x[3]
    stride = tl.cast(x[2], tl.int64)
    for i in tl.static_range(1, len(levels)):
        if which == i:
            x = levels[i]
            pointers = x[0] + b * x[1] + anchor * x[3]
            stride = tl.cast(x[2], tl.int64)
    return pointers, stride


@triton.jit
def decoded(sides, decoding, anchor, mask):
    """Boxes from distances in strides; those that need no decoding as they are."""
    x1, y1, x2, y2 = sides
    if decoding is not None:
        centre, stride = decoding
        p_centre = centre[0] + anchor * centre[1]
        x = load(p_centre, mask)
        y = load(p_centre + centre[2], mask)
        s = load(stride[0] + anchor * stride[1], mask)
        x1, y1, x2, y2 = x - x1 * s, y - y1 * s, x + x2 * s, y + y2 * s
    return x1, y1, x2, y2


@triton.jit
def load_sides(sides, which, b, in_level, mask):
    p_side, s_side = level_pointers(sides, which, b, in_level)
    left = load(p_side, mask)
    top = load(p_side + s_side, mask)
    right = load(p_side + 2 * s_side, mask)
    bottom = load(p_side + 3 * s_side, mask)
    return left, top, right, bottom


@triton.jit
def load_target(p_target, stride):
    """The box of a target's row."""
    s = tl.cast(stride, tl.int64)
    p_box = p_target + stride
    x1 = load(p_box, None)
    y1 = load(p_box + s, None)
    x2 = load(p_box + 2 * s, None)
    y2 = load(p_box + 3 * s, None)
    return x1, y1, x2, y2


@triton.jit
def load_label(targets, s_image, b, t, n_classes):
    """(pointer to a target's row, its label, whether that is one of the classes)."""
    p_target = targets[0] + b * s_image + tl.cast(t, tl.int64) * targets[1]
    label = load(p_target, None)
    return p_target, label.to(tl.int64), (label >= 0.0) & (label < n_classes)


_COUNTS = ["s_image", "n_images", "n_targets", "n_classes", "n_anchors", "n_blocks"]


@triton.jit(do_not_specialize=_COUNTS)
def metric_kernel(
    logits, sides, sizes, anchors, decoding, targets, p_metric, p_best, p_key,
    s_image, n_images, n_targets, n_classes, n_anchors, n_blocks,
    METRIC: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """BT targets against BA anchors of a level: metrics of pairs, and the best similarities.

    METRIC: which IoU, its EPS, powers of IoU and probability, reach in strides. Targets without a
    class are left out. With strides of the anchors, rules are "yolo": best is the key of the
    largest metric, wherever it lies.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    block = pid - row * n_blocks
    problem = row // tl.cdiv(n_targets, BT)
    first_target = (row - problem * tl.cdiv(n_targets, BT)) * BT
    head = problem // n_images
    b = problem - head * n_images
    level, n, start, first = find_level(block, sizes, BA)
    in_level = first + tl.arange(0, BA)
    anchor = start + in_level
    m_anchor = in_level < n
    if first_target == 0:
        key = tl.zeros([BA], tl.int64)
        tl.store(p_key + problem * n_anchors + anchor, key, mask=m_anchor)
    p_logit, s_class = level_pointers(logits, head * len(sizes) + level, b, in_level)
    box = load_sides(sides, head * len(sizes) + level, b, in_level, m_anchor)
    box = decoded(box, decoding, anchor, m_anchor)
    points, strides = anchors
    p_anchor = points[0] + anchor * points[1]
    x = load(p_anchor, m_anchor)
    y = load(p_anchor + points[2], m_anchor)
    if strides is not None:
        limit = METRIC[4] * load(strides[0] + anchor * strides[1], m_anchor)
    for t in range(first_target, tl.minimum(first_target + BT, n_targets)):
        p_target, label, is_class = load_label(targets, s_image, b, t, n_classes)
        if is_class:
            target = load_target(p_target, targets[2])
            x1, y1, x2, y2 = target
            score = clamped_similarity(box, target, METRIC)
            _, p, _ = logistic(load(p_logit + label * s_class, m_anchor))
            metric = power(score, METRIC[2]) * power(p, METRIC[3])
            if strides is None:
                inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & m_anchor
            else:
                metric = tl.where(score == 0.0, 0.0, metric)
                inside = (x >= x1) & (y >= y1) & (x <= x2) & (y <= y2) & m_anchor
                inside &= (x - x1 <= limit) & (y - y1 <= limit)
                inside &= (x2 - x <= limit) & (y2 - y <= limit)
            pair = problem * n_targets + t
            p_pair = p_metric + pair * n_anchors + anchor
            tl.store(p_pair, tl.where(inside, metric, 0.0), mask=m_anchor)
            if strides is None:
                # tl.max skips NaN, which has to reach the score.
                is_nan = m_anchor & (score != score)
                best = tl.max(tl.where(m_anchor & ~is_nan, score, 0.0), axis=0)
                has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
                best = tl.where(has_nan, float("nan"), best)
            else:
                key = (bits_of(metric).to(tl.int64) << 32) | (LOW - anchor)
                best = tl.max(tl.where(m_anchor, key, 0), axis=0)
            tl.store(p_best + pair * n_blocks + block, best)


@triton.jit(do_not_specialize=[*_COUNTS, "topk"])
def candidates_kernel(
    sides, sizes, decoding, targets, p_metric, p_best, p_scale, p_key, p_kept,
    s_image, n_images, n_targets, n_classes, n_anchors, n_blocks, topk,
    METRIC: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The topk anchors of a target, each bid for by a key; and what scales their scores.

    One after the other, each time the largest below the last, in blocks of BA that the cache holds.
    If what is kept is to be written down, rules are "yolo", and sides, for the IoUs, are given.
    """
    pair = tl.program_id(0).to(tl.int64)
    problem = pair // n_targets
    t = pair - problem * n_targets
    head = problem // n_images
    b = problem - head * n_images
    p_target, _, is_class = load_label(targets, s_image, b, t, n_classes)
    if is_class:
        p_keys = p_key + problem * n_anchors
        if p_kept is None:
            best = tl.zeros([BA], tl.float32)
            has_nan = tl.zeros([BA], tl.int32)
            for start in range(0, n_blocks, BA):
                block = start + tl.arange(0, BA)
                value = load(p_best + pair * n_blocks + block, block < n_blocks)
                best = tl.where(value > best, value, best)
                has_nan |= (value != value).to(tl.int32)
            has_nan = tl.max(has_nan, axis=0) > 0
            tl.store(p_scale + 2 * pair + 1, tl.where(has_nan, float("nan"), tl.max(best, axis=0)))
        else:
            target = load_target(p_target, targets[2])
            p_kept += pair * tl.minimum(topk, n_anchors)
            best = tl.zeros([BA], tl.int64)
            for start in range(0, n_blocks, BA):
                block = start + tl.arange(0, BA)
                key = tl.load(p_best + pair * n_blocks + block, mask=block < n_blocks, other=0)
                best = tl.maximum(best, key)
            best = tl.max(best, axis=0)
            top = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            tl.store(p_scale + 2 * pair, top)

        # Of an anchor: the metric's bits, and below them the first of equals the largest.
        last = tl.full([], 2**63 - 1, tl.int64)
        n_kept = tl.full([], 0, tl.int32)
        while (n_kept < topk) & (last > 0):
            largest = tl.zeros([BA], tl.int64)
            for start in range(0, n_anchors, BA):
                anchor = start + tl.arange(0, BA)
                metric = load(p_metric + pair * n_anchors + anchor, anchor < n_anchors)
                bits = bits_of(metric)
                key = (bits.to(tl.int64) << 32) | (LOW - anchor)
                is_next = (bits > 0) & (key < last) & (key > largest)
                largest = tl.where(is_next, key, largest)
            last = tl.max(largest, axis=0)
            if p_kept is None:
                if n_kept == 0:
                    top = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                    tl.store(p_scale + 2 * pair, top)
                if last > 0:
                    bid = (last >> 32 << 32) | (LOW - t)
                    tl.atomic_max(p_keys + (LOW - (last & LOW)), bid, sem="relaxed")
            else:
                if (n_kept == 0) & (last == 0) & (best >> 32 > 0):
                    last = best
                # A list that is not full ends with a 0.
                if n_kept < n_anchors:
                    tl.store(p_kept + n_kept, last)
                if (last > 0) & (last >> 32 <= INFINITY):
                    found = LOW - (last & LOW)
                    level, _, _, in_level = find_level(found, sizes, 1)
                    box = load_sides(sides, head * len(sizes) + level, b, in_level, None)
                    box = decoded(box, decoding, found, None)
                    bits = bits_of(clamped_similarity(box, target, METRIC)).to(tl.int64)
                    tl.atomic_max(p_keys + found, (bits << 32) | (LOW - t), sem="relaxed")
            n_kept += 1


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "n_kept", "n"])
def winners_kernel(
    p_key, p_scale, p_kept, p_target, p_score, n_targets, n_anchors, n_kept, n,
    EPS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """What each of n anchors, of all problems, got; EPS is added to a target's largest metric.

    With rules "yolo" it runs through what the target keeps, for the largest of what it got.
    """
    row = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    m_row = row < n
    key = tl.load(p_key + row, mask=m_row, other=0)
    bits = key >> 32
    got = (key > 0) & (bits <= INFINITY)
    target = LOW - (key & LOW)
    pair = row // n_anchors * n_targets + target
    if p_kept is None:
        p_pair = p_scale + 2 * pair
        metric = bits.to(tl.int32).to(tl.float32, bitcast=True)
        score = metric / (load(p_pair, got) + EPS) * load(p_pair + 1, got)
    else:
        first = row // n_anchors * n_anchors
        mine = tl.zeros([BA], tl.int64)
        most = tl.zeros([BA], tl.int64)
        widest = tl.zeros([BA], tl.int64)
        k = tl.full([], 0, tl.int32)
        m_more = got
        while (k < n_kept) & (tl.max(m_more.to(tl.int32), axis=0) > 0):
            kept = tl.load(p_kept + pair * n_kept + k, mask=m_more, other=0)
            m_more = kept > 0
            at = first + (LOW - (kept & LOW))
            other = tl.load(p_key + at, mask=m_more, other=0)
            m_got = m_more & ((other & LOW) == (key & LOW)) & (kept >> 32 <= INFINITY)
            most = tl.maximum(most, tl.where(m_got, kept >> 32, 0))
            widest = tl.maximum(widest, tl.where(m_got, other >> 32, 0))
            mine = tl.where(m_got & (at == row), kept >> 32, mine)
            k += 1
        metric = mine.to(tl.int32).to(tl.float32, bitcast=True)
        most = most.to(tl.int32).to(tl.float32, bitcast=True)
        widest = widest.to(tl.int32).to(tl.float32, bitcast=True)
        best = load(p_scale + 2 * pair, got)
        score = metric / (tl.where(best != best, best, most) + EPS) * widest
    tl.store(p_target + row, tl.where(got, target, -1), mask=m_row)
    tl.store(p_score + row, tl.where(got, score, 0.0), mask=m_row)
