"""Every term of an anchor in one pass, all feature levels in one launch.

Each level is a tuple of its tensors (pointer, strides...), with rows (image, anchor), or None. A
program takes BR anchors of one image and level. Only rows that carry a term load what it needs.
"""

import triton
import triton.language as tl

from .boxes import distance_and_grad, overlap_loss_and_grad
from .classes import class_rows
from .math import (
    at_least,
    bce_and_grad,
    by_deltas,
    centerness,
    delta_decode,
    iou_and_grad,
    masked,
    times,
)
from .rows import load_box, load_rows, row_pointers, store_box


@triton.jit
def decoded(code, anchor, CODE: tl.constexpr):
    """A box from what a head regresses, and what `by_code` needs.

    CODE is (name, constants...); of another name than those here, codes are boxes.
    """
    if CODE[0] == "deltas":
        return delta_decode(code, anchor, CODE)
    elif CODE[0] == "distances":
        x, y, _, _ = anchor
        return (x - code[0], y - code[1], x + code[2], y + code[3]), code
    else:
        return code, code


@triton.jit
def by_code(by_box, slopes, CODE: tl.constexpr):
    if CODE[0] == "deltas":
        return by_deltas(by_box, slopes)
    elif CODE[0] == "distances":
        return -by_box[0], -by_box[1], by_box[2], by_box[3]
    else:
        return by_box


@triton.jit
def box_loss_and_grad(p, t, LOSS: tl.constexpr):
    """Loss and gradient by p of a pair of boxes."""
    if LOSS[0] == "l1":
        x1, dx1 = distance_and_grad(p[0] - t[0], LOSS)
        y1, dy1 = distance_and_grad(p[1] - t[1], LOSS)
        x2, dx2 = distance_and_grad(p[2] - t[2], LOSS)
        y2, dy2 = distance_and_grad(p[3] - t[3], LOSS)
        return x1 + y1 + x2 + y2, (dx1, dy1, dx2, dy2)
    else:
        loss, dp, _ = overlap_loss_and_grad(p, t, LOSS)
        return loss, dp


@triton.jit
def put_sum(p_out, term, value):
    """This program's sum of a term: [terms, programs]."""
    p = p_out + term * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    tl.store(p, tl.sum(value, axis=0))


@triton.jit
def upstream_of(dout, p_scale, loss):
    """The upstream gradient of a loss, times its factor; all losses' may be one number."""
    return tl.load(dout[0] + loss * dout[1]) * tl.load(p_scale + loss)


@triton.jit(do_not_specialize=["n_images"])
def dense_kernel(
    levels, p_out, dout, p_scale, sizes, n_images, n_classes,
    CLASSES: tl.constexpr, BOXES: tl.constexpr, CODE: tl.constexpr, CENTRED: tl.constexpr,
    BACKGROUND: tl.constexpr, MIN_QUALITY: tl.constexpr, UNION_EPS: tl.constexpr,
    N_LEVELS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Class, box and, where boxes weigh as much as they are CENTRED, centerness.

    BACKGROUND: the weight of label n_classes, or -1. MIN_QUALITY: the least IoU of a label's box as
    its target, or 0 where that is given.
    Sums of a program: class, box, centerness or else quality, box weights.
    """
    pid = tl.program_id(0)
    start = 0
    for i in tl.static_range(N_LEVELS):
        n_blocks = tl.cdiv(sizes[i], BR)
        if (pid >= start) & (pid < start + n_images * n_blocks):
            (scores, labels, quality, weights, mask, codes, anchors, targets, logits,
             dscores, dcodes, dlogits) = levels[i]  # fmt: skip
            image = (pid - start) // n_blocks
            row = ((pid - start - image * n_blocks) * BR + tl.arange(0, BR)).to(tl.int64)
            at = (image.to(tl.int64), row)
            m_row = row < sizes[i]
            index = tl.load(row_pointers(labels, at), mask=m_row, other=-1)
            m_object = m_row & (index >= 0) & (index < n_classes)

            target = load_box(targets, at, m_object)
            anchor = target
            if anchors is not None:
                anchor = load_box(anchors, at, m_object)
            box, slopes = decoded(load_box(codes, at, m_object), anchor, CODE)
            metric = load_rows(quality, at, m_row, 1.0)
            box_weight = metric
            if CENTRED:
                box_weight = centerness(anchor, target)
            box_weight = tl.where(m_object, box_weight, 0.0)
            score = metric
            if MIN_QUALITY > 0.0:
                iou, _, _, _, _ = iou_and_grad(box, target, UNION_EPS, False)
                score, _ = at_least(iou, MIN_QUALITY)

            class_weight = load_rows(weights, at, m_row, 1.0)
            if BACKGROUND >= 0.0:
                class_weight = tl.where(index == n_classes, BACKGROUND, class_weight)
            if CLASSES[0] == "bce":
                class_weight = tl.where(index < 0, 0.0, class_weight)
            if dout is not None:
                class_weight *= upstream_of(dout, p_scale, i)
            if (dout is None) or (dscores is not None):
                total = class_rows(
                    (scores, dscores, mask), at, m_row, index, (score, class_weight), n_classes,
                    CLASSES, BC,
                )  # fmt: skip
            # Whatever a box of weight 0 holds, it adds nothing.
            m_used = m_object & (box_weight != 0.0)
            logit = load_rows(logits, at, m_object, 0.0)
            if dout is None:
                put_sum(p_out, 0, tl.where(m_row, total, 0.0))
                loss, _ = box_loss_and_grad(box, target, BOXES)
                put_sum(p_out, 1, tl.where(m_used, box_weight * loss, 0.0))
                if CENTRED:
                    loss, _ = bce_and_grad(logit, box_weight)
                    put_sum(p_out, 2, tl.where(m_object, loss, 0.0))
                else:
                    put_sum(p_out, 2, tl.where(m_row, metric, 0.0))
                put_sum(p_out, 3, box_weight)
            else:
                if dcodes is not None:
                    _, by_box = box_loss_and_grad(box, target, BOXES)
                    up = box_weight * upstream_of(dout, p_scale, N_LEVELS + i)
                    by_box = times(by_box, up)
                    store_box(dcodes, at, masked(by_code(by_box, slopes, CODE), m_used), m_row)
                if dlogits is not None:
                    _, dx = bce_and_grad(logit, box_weight)
                    dx *= upstream_of(dout, p_scale, 2 * N_LEVELS + i)
                    tl.store(row_pointers(dlogits, at), tl.where(m_object, dx, 0.0), mask=m_row)
        start += n_images * n_blocks
