"""YOLOX's losses in one pass over all anchors: objectness of all, classes and boxes of positives.

The targets of positives lie packed: the k-th anchor that is set in a mask has the k-th row. How
many are set in each program's anchors is counted first, so that it knows its positives' rows.
"""

import triton
import triton.language as tl

from .dense import box_loss_and_grad, put_sum, upstream_of
from .math import bce_and_grad, masked, times
from .rows import load, load_box, load_rows, row_pointers, store_box, tile_pointers
from .selection import count


@triton.jit
def anchors_of_program(mask, n_rows, n_blocks, BR: tl.constexpr):
    """(image, anchor), number among those of all images, which are there, which of them are set."""
    pid = tl.program_id(0).to(tl.int64)
    image = pid // n_blocks
    row = (pid - image * n_blocks) * BR + tl.arange(0, BR)
    m_row = row < n_rows
    number = image * n_rows + row
    is_set = tl.load(mask[0] + number * mask[1], mask=m_row, other=0) != 0
    return (image, row), number, m_row, m_row & is_set


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def count_kernel(mask, p_counts, n_rows, n_blocks, BR: tl.constexpr):
    """How many of a program's anchors are set."""
    _, _, _, is_set = anchors_of_program(mask, n_rows, n_blocks, BR)
    tl.store(p_counts + tl.program_id(0), count(is_set).to(tl.float32))


@triton.jit
def counted(p_counts, n, BLOCK: tl.constexpr):
    """The sum of the first n counts, which float32 holds exactly one by one."""
    total = tl.zeros([BLOCK], tl.int32)
    for done in range(0, n, BLOCK):
        column = done + tl.arange(0, BLOCK)
        total += tl.load(p_counts + column, mask=column < n, other=0.0).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def counting_bce(x, t):
    """Binary cross-entropy and its gradient; a negative target weighs 0."""
    loss, dx = bce_and_grad(x, t)
    weight = tl.where(t >= 0.0, 1.0, 0.0)
    return loss * weight, dx * weight


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "n_targets"])
def positives_kernel(
    levels, p_out, dout, p_scale, p_counts, mask, targets, n_rows, n_blocks, n_targets, n_classes,
    BOXES: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Sums of a program: classes, boxes, objectness and, with raw boxes, their distance."""
    objectness, classes, boxes, raw, dobjectness, dclasses, dboxes, draw = levels[0]
    of_objects, of_classes, of_boxes, of_raw = targets
    at, number, m_row, is_set = anchors_of_program(mask, n_rows, n_blocks, BR)
    n_set = count(is_set)
    before = counted(p_counts, tl.where(n_set > 0, tl.program_id(0), 0), BLOCK)
    rank = before + tl.cumsum(is_set.to(tl.int32), axis=0) - 1
    m_found = is_set & (rank < n_targets)
    at_target = (0, tl.where(m_found, rank, 0).to(tl.int64))

    if (dout is None) or (dobjectness is not None):
        object_loss, by_logit = counting_bce(
            load_rows(objectness, at, m_row, 0.0), load_rows(of_objects, (0, number), m_row, 0.0)
        )
        if dout is None:
            put_sum(p_out, 2, tl.where(m_row, object_loss, 0.0))
        else:
            by_logit *= upstream_of(dout, p_scale, 2)
            tl.store(row_pointers(dobjectness, at), by_logit, mask=m_row)

    if (dout is None) or (dclasses is not None):
        total = tl.zeros([BR], tl.float32)
        scale = 0.0
        n_read = n_classes
        if dout is None:
            # Most programs have no positives.
            n_read = tl.where(n_set > 0, n_classes, 0)
        else:
            scale = upstream_of(dout, p_scale, 0)
        for start in range(0, n_read, BC):
            column = start + tl.arange(0, BC)
            m_column = (column < n_classes)[None, :]
            m_tile = m_found[:, None] & m_column
            column = column.to(tl.int64)
            loss, dx = counting_bce(
                load(tile_pointers(classes, at, column), m_tile),
                load(tile_pointers(of_classes, at_target, column), m_tile),
            )
            if dout is None:
                total += tl.sum(tl.where(m_tile, loss, 0.0), axis=1)
            else:
                dx = tl.where(m_tile, dx * scale, 0.0)
                tl.store(tile_pointers(dclasses, at, column), dx, mask=m_row[:, None] & m_column)
        if dout is None:
            put_sum(p_out, 0, total)

    if (dout is None) or (dboxes is not None):
        box = load_box(boxes, at, m_found)
        loss, by_box = box_loss_and_grad(box, load_box(of_boxes, at_target, m_found), BOXES)
        if dout is None:
            put_sum(p_out, 1, tl.where(m_found, loss, 0.0))
        else:
            by_box = times(by_box, upstream_of(dout, p_scale, 1))
            store_box(dboxes, at, masked(by_box, m_found), m_row)

    if (raw is not None) and ((dout is None) or (draw is not None)):
        box = load_box(raw, at, m_found)
        loss, by_box = box_loss_and_grad(box, load_box(of_raw, at_target, m_found), RAW)
        if dout is None:
            put_sum(p_out, 3, tl.where(m_found, loss, 0.0))
        else:
            by_box = times(by_box, upstream_of(dout, p_scale, 3))
            store_box(draw, at, masked(by_box, m_found), m_row)
