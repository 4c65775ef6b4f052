"""Pairs of predictions and targets: metrics and costs for matching. No gradients.

Tensors are tuples as in `rows.py`, with rows (image, row). Targets have their stride from image to
image passed apart, as counts are, for it grows with their number.
"""

import triton
import triton.language as tl

from .math import (
    aspect_and_grad,
    centre_and_grad,
    corners,
    giou_loss_and_grad,
    iou_and_grad,
    logistic,
    power,
    size,
)
from .rows import load, load_box, row_pointers


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


@triton.jit(do_not_specialize=["s_logits", "s_targets", "n_targets", "n_anchors", "n_blocks"])
def task_aligned_kernel(
    boxes, logits, anchors, targets, p_metric, p_best,
    s_logits, s_targets, n_targets, n_anchors, n_blocks,
    IOU: tl.constexpr, IOU_POWER: tl.constexpr, CLASS_POWER: tl.constexpr, EPS: tl.constexpr,
    BA: tl.constexpr,
):  # fmt: skip
    """One target against BA anchors: the metric of each pair, and the block's best similarity."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // n_blocks
    b = pair // n_targets
    t = pair - b * n_targets
    anchor = (pid - pair * n_blocks) * BA + tl.arange(0, BA)
    m_anchor = anchor < n_anchors
    target = load_box((targets[0], s_targets, targets[1], targets[2]), (b, t), None)
    score = similarity(load_box(boxes, (b, anchor), m_anchor), target, IOU, EPS)
    score = tl.where(score < 0.0, 0.0, tl.where(score > 1.0, 1.0, score))
    p_anchor = anchors[0] + anchor * anchors[1]
    x = load(p_anchor, m_anchor)
    y = load(p_anchor + anchors[2], m_anchor)
    x1, y1, x2, y2 = target
    inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & m_anchor
    p_logit = logits[0] + b * s_logits + t * logits[1] + anchor * logits[2]
    _, p, _ = logistic(load(p_logit, m_anchor))
    metric = power(score, IOU_POWER) * power(p, CLASS_POWER)
    tl.store(p_metric + pair * n_anchors + anchor, tl.where(inside, metric, 0.0), mask=m_anchor)
    # tl.max skips NaN, which has to reach the metric.
    is_nan = m_anchor & (score != score)
    best = tl.max(tl.where(m_anchor & ~is_nan, score, 0.0), axis=0)
    has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
    tl.store(p_best + pid, tl.where(has_nan, float("nan"), best))


_COST_COUNTS = [
    "s_labels", "s_targets", "n_images", "n_targets", "n_queries", "n_classes", "n_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=_COST_COUNTS)
def match_cost_kernel(
    logits, boxes, labels, targets, p_cost,
    s_labels, s_targets, n_images, n_targets, n_queries, n_classes, n_blocks,
    WEIGHTS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, LOG_EPS: tl.constexpr,
    GIOU_EPS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """One target of an image and layer against BQ queries; boxes cxcywh.

    WEIGHTS of the class cost, the distance and the GIoU.
    """
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // n_blocks
    problem = pair // n_targets
    t = pair - problem * n_targets
    b = problem % n_images
    query = (pid - pair * n_blocks) * BQ + tl.arange(0, BQ)
    m_query = query < n_queries
    label = tl.load(labels[0] + b * s_labels + t * labels[1]).to(tl.int64)
    m_class = (label >= 0) & (label < n_classes)
    x = load(row_pointers(logits, (problem, query)) + label * logits[3], m_query & m_class)
    _, p, q = logistic(x)
    positive = ALPHA * power(q, GAMMA) * -tl.log(p + LOG_EPS)
    negative = (1.0 - ALPHA) * power(p, GAMMA) * -tl.log(q + LOG_EPS)
    target = load_box((targets[0], s_targets, targets[1], targets[2]), (b, t), None)
    box = load_box(boxes, (problem, query), m_query)
    distance = tl.abs(box[0] - target[0]) + tl.abs(box[1] - target[1])
    distance += tl.abs(box[2] - target[2]) + tl.abs(box[3] - target[3])
    giou_loss, _, _ = giou_loss_and_grad(corners(box), corners(target), GIOU_EPS)
    cost = WEIGHTS[0] * (positive - negative) + WEIGHTS[1] * distance + WEIGHTS[2] * (giou_loss - 1)
    tl.store(p_cost + pair * n_queries + query, cost, mask=m_query)
