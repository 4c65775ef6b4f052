"""Pairs of predictions and targets: metrics and costs for matching. No gradients."""

import triton
import triton.language as tl

from .math import (
    aspect_and_grad,
    centre_and_grad,
    giou_loss_and_grad,
    iou_and_grad,
    logistic,
    power,
)
from .rows import of_column


@triton.jit
def similarity(
    px1, py1, px2, py2, tx1, ty1, tx2, ty2, IOU: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """IoU, DIoU or CIoU, EPS added to the denominators."""
    iou, _, _, _, _ = iou_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS, True)
    value = iou
    if IOU != "iou":
        ratio, _, _, _, _, _, _, _, _ = centre_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS)
        value = iou - ratio
    if IOU == "ciou":
        aspect, _, _, _, _, _ = aspect_and_grad(
            px2 - px1, py2 - py1, tx2 - tx1, ty2 - ty1, iou, EPS, False
        )
        value = value - aspect
    return value


@triton.jit(do_not_specialize=["n_targets", "n_anchors", "n_blocks"])
def task_aligned_kernel(
    p_boxes, p_logits, p_anchors, p_targets, p_metric, p_best,
    s_boxes_b, s_boxes_a, s_boxes_f, s_logits_b, s_logits_t, s_logits_a,
    s_anchors_a, s_anchors_f, s_targets_b, s_targets_t, s_targets_f,
    n_targets, n_anchors, n_blocks,
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
    p_target = p_targets + b * s_targets_b + t * s_targets_t
    tx1 = tl.load(p_target).to(tl.float32)
    ty1 = tl.load(p_target + s_targets_f).to(tl.float32)
    tx2 = tl.load(p_target + of_column(2, s_targets_f)).to(tl.float32)
    ty2 = tl.load(p_target + of_column(3, s_targets_f)).to(tl.float32)
    p_box = p_boxes + b * s_boxes_b + anchor * s_boxes_a
    px1 = tl.load(p_box, mask=m_anchor, other=0.0).to(tl.float32)
    py1 = tl.load(p_box + s_boxes_f, mask=m_anchor, other=0.0).to(tl.float32)
    px2 = tl.load(p_box + of_column(2, s_boxes_f), mask=m_anchor, other=0.0).to(tl.float32)
    py2 = tl.load(p_box + of_column(3, s_boxes_f), mask=m_anchor, other=0.0).to(tl.float32)
    score = similarity(px1, py1, px2, py2, tx1, ty1, tx2, ty2, IOU, EPS)
    score = tl.where(score < 0.0, 0.0, tl.where(score > 1.0, 1.0, score))
    x = tl.load(p_anchors + anchor * s_anchors_a, mask=m_anchor, other=0.0).to(tl.float32)
    y = tl.load(p_anchors + anchor * s_anchors_a + s_anchors_f, mask=m_anchor, other=0.0).to(
        tl.float32
    )
    inside = (x > tx1) & (y > ty1) & (x < tx2) & (y < ty2) & m_anchor
    o_logit = b * s_logits_b + t * s_logits_t + anchor * s_logits_a
    _, p, _ = logistic(tl.load(p_logits + o_logit, mask=m_anchor, other=0.0).to(tl.float32))
    metric = power(score, IOU_POWER) * power(p, CLASS_POWER)
    tl.store(p_metric + pair * n_anchors + anchor, tl.where(inside, metric, 0.0), mask=m_anchor)
    # tl.max skips NaN, which a metric has to show.
    is_nan = m_anchor & (score != score)
    best = tl.max(tl.where(m_anchor & ~is_nan, score, 0.0), axis=0)
    has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
    tl.store(p_best + pid, tl.where(has_nan, float("nan"), best))


@triton.jit(do_not_specialize=["n_images", "n_targets", "n_queries", "n_classes", "n_blocks"])
def match_cost_kernel(
    p_logits, p_boxes, p_labels, p_targets, p_cost,
    s_logits_p, s_logits_q, s_logits_c, s_boxes_p, s_boxes_q, s_boxes_f,
    s_labels_b, s_labels_t, s_targets_b, s_targets_t, s_targets_f,
    n_images, n_targets, n_queries, n_classes, n_blocks,
    CLASS: tl.constexpr, L1: tl.constexpr, GIOU: tl.constexpr, ALPHA: tl.constexpr,
    GAMMA: tl.constexpr, LOG_EPS: tl.constexpr, GIOU_EPS: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """One target of one image of one layer against BQ queries; boxes cxcywh."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // n_blocks
    problem = pair // n_targets
    t = pair - problem * n_targets
    b = problem % n_images
    query = (pid - pair * n_blocks) * BQ + tl.arange(0, BQ)
    m_query = query < n_queries
    label = tl.load(p_labels + b * s_labels_b + t * s_labels_t)
    m_class = (label >= 0) & (label < n_classes)
    p_logit = p_logits + problem * s_logits_p + query * s_logits_q + label * s_logits_c
    x = tl.load(p_logit, mask=m_query & m_class, other=0.0).to(tl.float32)
    _, p, q = logistic(x)
    positive = ALPHA * power(q, GAMMA) * -tl.log(p + LOG_EPS)
    negative = (1.0 - ALPHA) * power(p, GAMMA) * -tl.log(q + LOG_EPS)
    p_target = p_targets + b * s_targets_b + t * s_targets_t
    tx = tl.load(p_target).to(tl.float32)
    ty = tl.load(p_target + s_targets_f).to(tl.float32)
    tw = tl.load(p_target + of_column(2, s_targets_f)).to(tl.float32)
    th = tl.load(p_target + of_column(3, s_targets_f)).to(tl.float32)
    p_box = p_boxes + problem * s_boxes_p + query * s_boxes_q
    px = tl.load(p_box, mask=m_query, other=0.0).to(tl.float32)
    py = tl.load(p_box + s_boxes_f, mask=m_query, other=0.0).to(tl.float32)
    pw = tl.load(p_box + of_column(2, s_boxes_f), mask=m_query, other=0.0).to(tl.float32)
    ph = tl.load(p_box + of_column(3, s_boxes_f), mask=m_query, other=0.0).to(tl.float32)
    distance = tl.abs(px - tx) + tl.abs(py - ty) + tl.abs(pw - tw) + tl.abs(ph - th)
    giou, _, _, _, _, _, _, _, _ = giou_loss_and_grad(
        px - 0.5 * pw, py - 0.5 * ph, px + 0.5 * pw, py + 0.5 * ph,
        tx - 0.5 * tw, ty - 0.5 * th, tx + 0.5 * tw, ty + 0.5 * th, GIOU_EPS,
    )  # fmt: skip
    cost = CLASS * (positive - negative) + L1 * distance + GIOU * (giou - 1.0)
    tl.store(p_cost + pair * n_queries + query, cost, mask=m_query)
