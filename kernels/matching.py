"""Costs of pairs of predictions and targets, for matching, and matches. No gradients.

Tensors are tuples as in `rows.py`, with rows (image, row). Targets have their stride from image to
image passed apart, as counts are, for it grows with their number.
"""

import triton
import triton.language as tl

from .math import corners, giou_loss_and_grad, iou_and_grad, log_sum_exp, logistic, power
from .rows import load, load_box, row_pointers, tile_pointers

# Classes that a program takes at a time.
_CLASSES = tl.constexpr(16)


@triton.jit
def log_of_sum(p_logits, s_class, m_query, n_classes):
    """log sum exp of each query's logits [1, BQ]."""
    rows = (tl.reshape(p_logits, [p_logits.shape[1]]), 0, 0, s_class)
    m_row = tl.reshape(m_query, [m_query.shape[1]])
    top = tl.full(m_row.shape, float("-inf"), tl.float32)
    total = tl.zeros(m_row.shape, tl.float32)
    for start in range(0, n_classes, _CLASSES):
        column = start + tl.arange(0, _CLASSES)
        m_column = (column < n_classes)[None, :]
        p_tile = tile_pointers(rows, (0, 0), column.to(tl.int64))
        x = tl.where(m_column, load(p_tile, m_row[:, None] & m_column), float("-inf"))
        top, total = log_sum_exp(top, total, x)
    return (top + tl.log(total))[None, :]


_COST_COUNTS = [
    "s_labels", "s_targets", "n_images", "n_targets", "n_queries", "n_classes",
]  # fmt: skip


@triton.jit(do_not_specialize=_COST_COUNTS)
def match_cost_kernel(
    logits, boxes, labels, targets, p_cost,
    s_labels, s_targets, n_images, n_targets, n_queries, n_classes,
    WEIGHTS: tl.constexpr, CLASSES: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """BT targets of an image and layer against BQ queries; boxes cxcywh.

    Logits and boxes are tuples of layers, of one type and feature stride. WEIGHTS of the class
    cost, the distance and the GIoU. CLASSES: whether p is of a softmax, alpha, gamma, what is added
    in logarithms, the power of an IoU in place of all costs or -1. EPS: the least union of an IoU,
    of a GIoU.
    """
    pid = tl.program_id(0).to(tl.int64)
    n_blocks = tl.cdiv(n_queries, BQ)
    tile = pid // n_blocks
    n_tiles = tl.cdiv(n_targets, BT)
    problem = tile // n_tiles
    t = ((tile - problem * n_tiles) * BT + tl.arange(0, BT))[:, None]
    m_target = t < n_targets
    layer = problem // n_images
    b = problem - layer * n_images
    query = ((pid - tile * n_blocks) * BQ + tl.arange(0, BQ))[None, :]
    m_query = query < n_queries
    label = tl.load(labels[0] + b * s_labels + t * labels[1], mask=m_target, other=-1).to(tl.int64)
    m_class = (label >= 0) & (label < n_classes)
    p_logits = row_pointers(logits[0], (b, query))
    p_box = row_pointers(boxes[0], (b, query))
    for i in tl.static_range(1, len(logits)):
        if layer == i:
            p_logits = row_pointers(logits[i], (b, query))
            p_box = row_pointers(boxes[i], (b, query))
    x = load(p_logits + label * logits[0][3], m_query & m_class)
    if CLASSES[0]:
        p = tl.exp(x - log_of_sum(p_logits, logits[0][3], m_query, n_classes))
        p = tl.where(m_class, p, 0.0)
        of_class = -p
    else:
        _, p, q = logistic(x)
        positive = CLASSES[1] * power(q, CLASSES[2]) * -tl.log(p + CLASSES[3])
        negative = (1.0 - CLASSES[1]) * power(p, CLASSES[2]) * -tl.log(q + CLASSES[3])
        of_class = positive - negative
    target = load_box((targets[0], s_targets, targets[1], targets[2]), (b, t), m_target)
    box = load_box((p_box, 0, 0, boxes[0][3]), (0, 0), m_query)
    if CLASSES[4] >= 0:
        iou, _, _, _, _ = iou_and_grad(corners(box), corners(target), EPS[0], False)
        cost = -p * power(iou, CLASSES[4])
    else:
        distance = tl.abs(box[0] - target[0]) + tl.abs(box[1] - target[1])
        distance += tl.abs(box[2] - target[2]) + tl.abs(box[3] - target[3])
        giou_loss, _, _ = giou_loss_and_grad(corners(box), corners(target), EPS[1])
        cost = WEIGHTS[0] * of_class + WEIGHTS[1] * distance + WEIGHTS[2] * (giou_loss - 1)
    row = problem * n_targets + t
    tl.store(p_cost + row * n_queries + query, cost, mask=m_target & m_query)


@triton.jit(do_not_specialize=["n_layers", "n_targets", "n_queries", "n_blocks"])
def union_kernel(
    matches, p_union, n_layers, n_targets, n_queries, n_blocks, BQ: tl.constexpr
):  # fmt: skip
    """BQ queries of an image: the target that most layers give each, of equals the first."""
    pid = tl.program_id(0)
    image = pid // n_blocks
    query = (pid - image * n_blocks) * BQ + tl.arange(0, BQ)
    m_query = query < n_queries
    b = image.to(tl.int64)
    p_query = matches[0] + b * matches[2] + query.to(tl.int64) * matches[3]
    best = tl.zeros([BQ], tl.int32)
    union = tl.full([BQ], -1, tl.int64)
    for i in range(n_layers):
        target = tl.load(p_query + tl.cast(i, tl.int64) * matches[1], mask=m_query, other=-1)
        count = tl.zeros([BQ], tl.int32)
        for j in range(n_layers):
            other = tl.load(p_query + tl.cast(j, tl.int64) * matches[1], mask=m_query, other=-1)
            count += (other == target).to(tl.int32)
        is_target = (target >= 0) & (target < n_targets)
        is_better = (count > best) | ((count == best) & (target < union))
        union = tl.where(is_target & is_better, target, union)
        best = tl.where(is_target & is_better, count, best)
    tl.store(p_union + b * n_queries + query, union, mask=m_query)
