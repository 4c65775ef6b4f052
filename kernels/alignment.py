"""Task-aligned matching: which target each anchor gets, in three launches. No gradients.

Anchors lie in levels, each a tensor of its own: a tuple of tuples (pointer, image, feature, anchor
stride), heads one after the other, where `sizes` are the anchors of a head's levels. Heads and
images together are problems: problem = head * n_images + image.

An anchor that several targets keep takes the largest of their keys, integers that have no ties: the
metric's bits above, below them the target, the first of equals being the largest.
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

    METRIC: which IoU, its EPS, powers of IoU and probability. Targets without a class are left out.
    """
    IOU: tl.constexpr = tl.constexpr(METRIC[0])
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
    p_side, s_side = level_pointers(sides, head * len(sizes) + level, b, in_level)
    p_logit, s_class = level_pointers(logits, head * len(sizes) + level, b, in_level)
    left = load(p_side, m_anchor)
    top = load(p_side + s_side, m_anchor)
    right = load(p_side + 2 * s_side, m_anchor)
    bottom = load(p_side + 3 * s_side, m_anchor)
    box = decoded((left, top, right, bottom), decoding, anchor, m_anchor)
    p_anchor = anchors[0] + anchor * anchors[1]
    x = load(p_anchor, m_anchor)
    y = load(p_anchor + anchors[2], m_anchor)
    for t in range(first_target, tl.minimum(first_target + BT, n_targets)):
        p_target, label, is_class = load_label(targets, s_image, b, t, n_classes)
        if is_class:
            p_box = p_target + targets[2]
            s = tl.cast(targets[2], tl.int64)
            x1 = load(p_box, None)
            y1 = load(p_box + s, None)
            x2 = load(p_box + 2 * s, None)
            y2 = load(p_box + 3 * s, None)
            score = similarity(box, (x1, y1, x2, y2), IOU, METRIC[1])
            score = tl.where(score < 0.0, 0.0, tl.where(score > 1.0, 1.0, score))
            _, p, _ = logistic(load(p_logit + label * s_class, m_anchor))
            metric = power(score, METRIC[2]) * power(p, METRIC[3])
            inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & m_anchor
            pair = problem * n_targets + t
            p_pair = p_metric + pair * n_anchors + anchor
            tl.store(p_pair, tl.where(inside, metric, 0.0), mask=m_anchor)
            # tl.max skips NaN, which has to reach the score.
            is_nan = m_anchor & (score != score)
            best = tl.max(tl.where(m_anchor & ~is_nan, score, 0.0), axis=0)
            has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
            tl.store(p_best + pair * n_blocks + block, tl.where(has_nan, float("nan"), best))


@triton.jit(do_not_specialize=[*_COUNTS, "topk"])
def candidates_kernel(
    targets, p_metric, p_best, p_scale, p_key,
    s_image, n_images, n_targets, n_classes, n_anchors, n_blocks, topk, BA: tl.constexpr,
):  # fmt: skip
    """The topk anchors of a target, each bid for by a key; and what scales their scores.

    One after the other, each time the largest below the last, in blocks of BA that the cache holds.
    """
    pair = tl.program_id(0).to(tl.int64)
    problem = pair // n_targets
    t = pair - problem * n_targets
    _, _, is_class = load_label(targets, s_image, problem % n_images, t, n_classes)
    if is_class:
        best = tl.zeros([BA], tl.float32)
        has_nan = tl.zeros([BA], tl.int32)
        for start in range(0, n_blocks, BA):
            block = start + tl.arange(0, BA)
            value = load(p_best + pair * n_blocks + block, block < n_blocks)
            best = tl.where(value > best, value, best)
            has_nan |= (value != value).to(tl.int32)
        has_nan = tl.max(has_nan, axis=0) > 0
        tl.store(p_scale + 2 * pair + 1, tl.where(has_nan, float("nan"), tl.max(best, axis=0)))

        p_keys = p_key + problem * n_anchors
        # Of an anchor: the metric's bits, and below them the first of equals the largest.
        last = tl.full([], 2**63 - 1, tl.int64)
        n_kept = tl.full([], 0, tl.int32)
        while (n_kept < topk) & (last > 0):
            largest = tl.zeros([BA], tl.int64)
            for start in range(0, n_anchors, BA):
                anchor = start + tl.arange(0, BA)
                metric = load(p_metric + pair * n_anchors + anchor, anchor < n_anchors)
                bits = tl.where(metric != metric, NAN, metric.to(tl.int32, bitcast=True))
                key = (bits.to(tl.int64) << 32) | (LOW - anchor)
                is_next = (bits > 0) & (key < last) & (key > largest)
                largest = tl.where(is_next, key, largest)
            last = tl.max(largest, axis=0)
            if n_kept == 0:
                top = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                tl.store(p_scale + 2 * pair, top)
            if last > 0:
                bid = (last >> 32 << 32) | (LOW - t)
                tl.atomic_max(p_keys + (LOW - (last & LOW)), bid, sem="relaxed")
            n_kept += 1


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "n"])
def winners_kernel(
    p_key, p_scale, p_target, p_score, n_targets, n_anchors, n,
    EPS: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """What each of n anchors, of all problems, got; EPS is added to a target's largest metric."""
    row = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    m_row = row < n
    key = tl.load(p_key + row, mask=m_row, other=0)
    bits = key >> 32
    got = (key > 0) & (bits <= INFINITY)
    target = LOW - (key & LOW)
    p_pair = p_scale + 2 * (row // n_anchors * n_targets + target)
    metric = bits.to(tl.int32).to(tl.float32, bitcast=True)
    score = metric / (load(p_pair, got) + EPS) * load(p_pair + 1, got)
    tl.store(p_target + row, tl.where(got, target, -1), mask=m_row)
    tl.store(p_score + row, tl.where(got, score, 0.0), mask=m_row)
