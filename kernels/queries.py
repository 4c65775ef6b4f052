"""All terms of queries in one launch: layers come as tuples, and pairs of queries and targets as
a map that says which target each query has.

Layers are of one type and layout, so that one body of code serves all. Only rows that carry a term
load what it needs. No index is read through unless it is in range.
"""

import triton
import triton.language as tl

from .classes import class_rows, softmax_rows
from .dense import put_sum, upstream_of
from .math import (
    added,
    at_least,
    bin_position,
    by_deltas,
    corners,
    distillation_and_grad,
    giou_loss_and_grad,
    iou_and_grad,
    l1_and_grad,
    logistic,
    masked,
    times,
    two_bin_and_grad,
)
from .rows import load, load_box, row_pointers, store_box, tile_pointers


@triton.jit
def program_of_layer(n_layers, n_blocks):
    """(layer, image, block) of this program."""
    pid = tl.program_id(0)
    n_each = tl.num_programs(0) // n_layers
    layer = pid // n_each
    image = (pid - layer * n_each) // n_blocks
    block = pid - layer * n_each - image * n_blocks
    return layer, image.to(tl.int64), block.to(tl.int64)


@triton.jit
def target_of(matches, targets, s_targets, n_targets, at, m_row):
    """(its index, which rows have one, its box) of the query at (layer, image, query)."""
    layer, b, query = at
    p_query = matches[0] + (layer.to(tl.int64) * matches[1] + b * matches[2] + query * matches[3])
    index = tl.load(p_query, mask=m_row, other=-1).to(tl.int64)
    m_found = m_row & (index >= 0) & (index < n_targets)
    index = tl.where(m_found, index, 0)
    of_image = (targets[0], s_targets, targets[1], targets[2])
    return index, m_found, load_box(of_image, (b, index), m_found)


@triton.jit
def overlap_of(box, target, m_found, UNION_EPS: tl.constexpr):
    """The IoU of boxes cxcywh, 0 where there is no target."""
    iou, _, _, _, _ = iou_and_grad(corners(box), corners(target), UNION_EPS, False)
    iou, _ = at_least(iou, 0.0)
    return tl.where(m_found, iou, 0.0)


@triton.jit
def pair_weight(box, target, m_found, BOXES: tl.constexpr, BY_GIOU: tl.constexpr):
    """What weighs each pair of boxes cxcywh, its GIoU or its IoU; 0 where there is no target."""
    if BY_GIOU:
        loss, _, _ = giou_loss_and_grad(corners(box), corners(target), BOXES[1])
        weight = tl.where(m_found, 1.0 - loss, 0.0)
    else:
        weight = overlap_of(box, target, m_found, BOXES[0])
    return weight


@triton.jit
def l1_of_box(p, t):
    x, dx = l1_and_grad(p[0] - t[0])
    y, dy = l1_and_grad(p[1] - t[1])
    w, dw = l1_and_grad(p[2] - t[2])
    h, dh = l1_and_grad(p[3] - t[3])
    return x + y + w + h, (dx, dy, dw, dh)


@triton.jit
def zero_rows(tensor, at, m_row, n_features, BC: tl.constexpr):
    for start in range(0, n_features, BC):
        column = start + tl.arange(0, BC)
        m_tile = m_row[:, None] & (column < n_features)[None, :]
        tl.store(tile_pointers(tensor, at, column.to(tl.int64)), 0.0, mask=m_tile)


@triton.jit
def classes_of(tensors, m_row, label, rows, n_classes, LOSS: tl.constexpr, BC: tl.constexpr):
    """As `class_rows`, of rows (score, scale) at (0, 0), or of a softmax."""
    score, scale = rows
    if LOSS[0] == "softmax":
        total = softmax_rows(tensors, (0, 0), m_row, label, scale, n_classes, BC)
    else:
        logits, dlogits = tensors
        total = class_rows(
            (logits, dlogits, None), (0, 0), m_row, label, (score, scale), n_classes, LOSS, BC
        )
    return total


_COUNTS = ["s_labels", "s_targets", "n_queries", "n_targets"]


@triton.jit(do_not_specialize=_COUNTS)
def queries_kernel(
    levels, p_out, dout, p_scale, matches, union, labels, targets,
    s_labels, s_targets, n_queries, n_targets, n_classes,
    CLASSES: tl.constexpr, TERMS: tl.constexpr, BOXES: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Losses of classes, L1 and GIoU of BR queries of an image and layer; boxes cxcywh.

    TERMS: which sum is of the classes, the distance, the overlap, the number of pairs and the
    weights of a softmax, -1 for none; then how many layers there are (before Triton 3.7 a tuple
    that holds None has no length). Boxes follow the `union` where there is one. BOXES: the
    least union of an IoU, of a GIoU; whether one weighs the GIoU losses; whether this is the GIoU;
    whether the score is.
    """
    LAYERS: tl.constexpr = tl.constexpr(TERMS[5])
    layer, b, block = program_of_layer(LAYERS, tl.cdiv(n_queries, BR))
    query = block * BR + tl.arange(0, BR)
    m_row = query < n_queries
    at = (b, query)
    logits, boxes, dlogits, dboxes = levels[0]
    p_logits = row_pointers(logits, at)
    p_boxes = row_pointers(boxes, at)
    p_dlogits = p_logits
    p_dboxes = p_boxes
    if dlogits is not None:
        p_dlogits = row_pointers(dlogits, at)
    if dboxes is not None:
        p_dboxes = row_pointers(dboxes, at)
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            p_logits = row_pointers(levels[i][0], at)
            p_boxes = row_pointers(levels[i][1], at)
            if dlogits is not None:
                p_dlogits = row_pointers(levels[i][2], at)
            if dboxes is not None:
                p_dboxes = row_pointers(levels[i][3], at)

    here = (layer, b, query)
    index, m_own, target = target_of(matches, targets, s_targets, n_targets, here, m_row)
    m_found = m_own
    of_box = target
    if union is not None:
        _, m_found, of_box = target_of(union, targets, s_targets, n_targets, here, m_row)
    box = load_box((p_boxes, 0, 0, boxes[3]), (0, 0), m_own | m_found)

    if TERMS[0] >= 0:
        score = tl.where(m_row, 1.0, 0.0)
        scale = score
        if CLASSES[0] != "focal" and CLASSES[0] != "bce":
            score = pair_weight(box, target, m_own, BOXES, BOXES[4])
        label = tl.load(labels[0] + b * s_labels + index * labels[1], mask=m_own, other=-1)
        if TERMS[4] >= 0:
            is_object = (label >= 0) & (label < n_classes - 1)
            label = tl.where(is_object, label, n_classes - 1)
            scale = tl.where(is_object, scale, scale * CLASSES[1])
        of_layer = (p_logits, 0, 0, logits[3])
        if dout is None:
            given = (score, scale)
            total = classes_of((of_layer, None), m_row, label, given, n_classes, CLASSES, BC)
            put_sum(p_out, TERMS[0], total)
            if TERMS[4] >= 0:
                put_sum(p_out, TERMS[4], scale)
        elif dlogits is not None:
            scale *= upstream_of(dout, p_scale, TERMS[0] * LAYERS + layer)
            by_layer = (p_dlogits, 0, 0, dlogits[3])
            given = (score, scale)
            classes_of((of_layer, by_layer), m_row, label, given, n_classes, CLASSES, BC)

    elif dlogits is not None:
        zero_rows((p_dlogits, 0, 0, dlogits[3]), (0, 0), m_row, n_classes, BC)

    distance, by_distance = l1_of_box(box, of_box)
    overlap, by_corners, _ = giou_loss_and_grad(corners(box), corners(of_box), BOXES[1])
    if BOXES[2]:
        weight = pair_weight(box, of_box, m_found, BOXES, BOXES[3])
        overlap *= weight
        by_corners = times(by_corners, weight)
    if dout is None:
        if TERMS[1] >= 0:
            put_sum(p_out, TERMS[1], tl.where(m_found, distance, 0.0))
        if TERMS[2] >= 0:
            put_sum(p_out, TERMS[2], tl.where(m_found, overlap, 0.0))
        if TERMS[3] >= 0:
            put_sum(p_out, TERMS[3], tl.where(m_found, 1.0, 0.0))
    elif dboxes is not None:
        zero = tl.zeros([BR], tl.float32)
        by_box = (zero, zero, zero, zero)
        if TERMS[1] >= 0:
            up = upstream_of(dout, p_scale, TERMS[1] * LAYERS + layer)
            by_box = added(by_box, times(by_distance, up))
        if TERMS[2] >= 0:
            up = upstream_of(dout, p_scale, TERMS[2] * LAYERS + layer)
            by_overlap = by_deltas(by_corners, (1.0, 1.0, 0.5, 0.5))
            by_box = added(by_box, times(by_overlap, up))
        store_box((p_dboxes, 0, 0, dboxes[3]), (0, 0), masked(by_box, m_found), m_row)


@triton.jit
def best_of_row(scores, at, m_row, n_scores, BC: tl.constexpr):
    """The largest entry of each row; NaN where there is one."""
    best = tl.where(m_row, float("-inf"), 0.0)
    has_nan = m_row & False
    for start in range(0, n_scores, BC):
        column = start + tl.arange(0, BC)
        m_tile = m_row[:, None] & (column < n_scores)[None, :]
        pointers = tile_pointers(scores, at, column.to(tl.int64))
        x = tl.load(pointers, mask=m_tile, other=float("-inf")).to(tl.float32)
        # The maximum skips NaN.
        has_nan = has_nan | (tl.max((x != x).to(tl.int32), axis=1) > 0)
        best = tl.maximum(best, tl.max(tl.where(x != x, float("-inf"), x), axis=1))
    return tl.where(has_nan, float("nan"), best)


@triton.jit
def bins_of_target(distance, positions, m_column, n_bins):
    """Of each row's distance: masks [BR, BK] of the bins around it, and the right one's weight."""
    column = tl.arange(0, positions.shape[0])
    is_below = m_column[None, :] & (positions[None, :] <= distance[:, None])
    left = tl.sum(is_below.to(tl.int32), axis=1) - 1
    left = tl.where(left < 0, 0, tl.where(left > n_bins - 2, n_bins - 2, left))
    is_left = column[None, :] == left[:, None]
    is_right = column[None, :] == (left + 1)[:, None]
    low = tl.sum(tl.where(is_left, positions[None, :], 0.0), axis=1)
    high = tl.sum(tl.where(is_right, positions[None, :], 0.0), axis=1)
    right = (distance - low) / (high - low)
    return is_left, is_right, tl.where(right < 0.0, 0.0, tl.where(right > 1.0, 1.0, right))


@triton.jit
def side_of(box, side):
    """The coordinate of a box that belongs to each row's side: l, t, r, b."""
    first = tl.where(side == 0, box[0], box[1])
    return tl.where(side < 2, first, tl.where(side == 2, box[2], box[3]))


@triton.jit(do_not_specialize=["s_targets", "n_queries", "n_targets", "n_taught"])
def localisation_kernel(
    levels, p_out, dout, p_scale, matches, targets, constants,
    s_targets, n_queries, n_targets, n_bins, n_scores, n_taught,
    TERMS: tl.constexpr, TEMPERATURE: tl.constexpr, EPS: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """BR sides of boxes of an image and layer: two bins and distillation, in tiles of whole rows.

    constants: up, reg_scale, shares of matched sides and others. TERMS: which sum is of the bins,
    the distillation and the number of matched queries, -1 for none; then how many layers there
    are. EPS: the least union, what is added to a size.
    """
    LAYERS: tl.constexpr = tl.constexpr(TERMS[3])
    layer, b, block = program_of_layer(LAYERS, tl.cdiv(n_queries * 4, BR))
    row = block * BR + tl.arange(0, BR)
    query = row // 4
    side = row - query * 4
    m_row = query < n_queries
    at = (b, query)
    corners_, points, boxes, teachers, scores, dcorners = levels[0]
    first = side * n_bins
    p_corners = row_pointers(corners_, at)
    p_points = row_pointers(points, at)
    p_boxes = row_pointers(boxes, at)
    p_teachers = p_corners
    p_scores = p_corners
    p_dcorners = p_corners
    if TERMS[1] >= 0:
        p_teachers = row_pointers(teachers, at)
        p_scores = row_pointers(scores, at)
    if dcorners is not None:
        p_dcorners = row_pointers(dcorners, at)
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            p_corners = row_pointers(levels[i][0], at)
            p_points = row_pointers(levels[i][1], at)
            p_boxes = row_pointers(levels[i][2], at)
            if TERMS[1] >= 0:
                p_teachers = row_pointers(levels[i][3], at)
                p_scores = row_pointers(levels[i][4], at)
            if dcorners is not None:
                p_dcorners = row_pointers(levels[i][5], at)

    here = (layer, b, query)
    _, m_found, target = target_of(matches, targets, s_targets, n_targets, here, m_row)
    box = load_box((p_boxes, 0, 0, boxes[3]), (0, 0), m_found)
    iou = overlap_of(box, target, m_found, EPS[0])
    m_bins = m_found & (iou != 0.0)
    m_taught = m_row & (layer < n_taught)
    weight = iou
    if TERMS[1] >= 0:
        m_other = m_taught & (m_found == 0)
        best = best_of_row((p_scores, 0, 0, scores[3]), (0, 0), m_other, n_scores, 16)
        _, confidence, _ = logistic(best)
        of_matched = iou * tl.load(constants[2][0])
        weight = tl.where(
            m_found, of_matched, confidence * tl.load(constants[2][0] + constants[2][1])
        )
        m_taught = m_taught & (weight != 0.0)
    else:
        m_taught = m_row & False

    column = tl.arange(0, BK)
    m_column = column < n_bins
    entry = first[:, None] + column.to(tl.int64)[None, :]
    m_tile = (m_bins | m_taught)[:, None] & m_column[None, :]
    x = load(p_corners[:, None] + entry * corners_[3], m_tile)
    by_x = tl.zeros([BR, BK], tl.float32)
    if TERMS[0] >= 0:
        point = load_box((p_points, 0, 0, points[3]), (0, 0), m_found)
        up = tl.load(constants[0]).to(tl.float32)
        scale = tl.abs(tl.load(constants[1]).to(tl.float32))
        size = tl.where(side % 2 == 0, point[2], point[3]) / scale + EPS[1]
        distance = side_of(corners(target), side)
        distance -= tl.where(side % 2 == 0, point[0], point[1])
        distance = tl.where(side < 2, -distance, distance) / size - scale / 2
        positions = bin_position(column, n_bins, up, scale)
        is_left, is_right, right = bins_of_target(distance, positions, m_column, n_bins)
        logits = tl.where(m_column[None, :], x, float("-inf"))
        loss, dx = two_bin_and_grad(logits, is_left, is_right, (1 - right)[:, None], right[:, None])
        if dout is None:
            put_sum(p_out, TERMS[0], tl.where(m_bins, iou * loss, 0.0))
        else:
            by_loss = iou * upstream_of(dout, p_scale, TERMS[0] * LAYERS + layer)
            by_x += tl.where(m_bins[:, None], by_loss[:, None] * dx, 0.0)
    if TERMS[1] >= 0:
        m_tile = m_taught[:, None] & m_column[None, :]
        t = load(p_teachers[:, None] + entry * teachers[3], m_tile)
        loss, dx = distillation_and_grad(x, t, m_column[None, :], TEMPERATURE)
        if dout is None:
            put_sum(p_out, TERMS[1], tl.where(m_taught, weight * loss, 0.0))
        else:
            by_loss = weight * upstream_of(dout, p_scale, TERMS[1] * LAYERS + layer)
            by_x += tl.where(m_tile, by_loss[:, None] * dx, 0.0)
    if dout is None:
        if TERMS[2] >= 0:
            put_sum(p_out, TERMS[2], tl.where(m_found & (side == 0), 1.0, 0.0))
    elif dcorners is not None:
        m_store = m_row[:, None] & m_column[None, :]
        tl.store(p_dcorners[:, None] + entry * dcorners[3], by_x, mask=m_store)


@triton.jit
def count_matches(p_matches, n, n_targets, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        place = start + tl.arange(0, BLOCK)
        target = tl.load(p_matches + place, mask=place < n, other=-1)
        total += ((target >= 0) & (target < n_targets)).to(tl.int32)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit(do_not_specialize=["n_own", "n_union", "n_targets"])
def shares_kernel(p_own, p_union, p_out, n_own, n_union, n_targets, BLOCK: tl.constexpr):
    """Of matched and of other sides: the weight of their mean over their number."""
    matched = count_matches(p_union, n_union, n_targets, BLOCK)
    # The size of the batch would scale both.
    of_matched = tl.sqrt(matched)
    of_others = tl.sqrt(n_union - matched)
    both = of_matched + of_others
    both = tl.where(both < 1.0, 1.0, both)
    own = 4.0 * count_matches(p_own, n_own, n_targets, BLOCK)
    others = 4.0 * n_own - own
    tl.store(p_out, of_matched / both / tl.where(own < 1.0, 1.0, own))
    tl.store(p_out + 1, of_others / both / tl.where(others < 1.0, 1.0, others))
