"""Assignment by largest overlap, as of SSD and Faster R-CNN. No gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, area, columns, overlap
from detloss_triton.engine import Sample, direct, strided
from detloss_triton.precision import arithmetic_dtype

from .assigning import IOU_EPS, iou, nothing, parts, real, told, unwritten

# Anchors that a program takes, and targets one after the other.
_BLOCK, _TARGETS = 128, 8


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def boxes(*shape: int) -> Tensor:
        low = 40 * torch.rand(*shape, 2, generator=generator)
        return torch.cat([low, low + 4 + 20 * torch.rand(low.shape, generator=generator)], -1)

    n_images, n_targets = 2, 7
    targets, anchors = boxes(n_images, n_targets), boxes(rows)
    labels = torch.randint(0, 5, (n_images, n_targets), generator=generator)
    # No label, what is equal, of no size, and behind the last; and anchors that tie.
    labels[0, 1] = -1
    targets[0, 4], targets[1, 0, 2:] = targets[0, 3], targets[1, 0, :2]
    anchors[1:5] = anchors[:1]
    counts = torch.tensor([n_targets, n_targets - 1])
    inside = torch.rand(rows, generator=generator) > 0.2
    crowd = torch.tensor([[1, 1], [1, -1]]), boxes(n_images, 2), torch.tensor([1, 2])
    names = ("pos_iou", "neg_low", "neg_high", "min_pos_iou", "gt_max_assign_all", "ignore_iof")
    for flags, ignored, numbers in (
        (None, (), (0.4, 0.0, 0.4, 0.0, False, -1.0)),
        (inside, crowd, (0.5, 0.1, 0.3, 0.2, True, 0.5)),
    ):
        params = dict(zip(names, numbers, strict=True))
        yield Sample((anchors, flags, labels, targets, counts, ignored), params)


@direct(samples=_samples, opaque=True)
def assign_max_iou(
    anchors: Tensor,
    inside: Tensor | None,
    labels: Tensor,
    targets: Tensor,
    counts: Tensor,
    ignored: tuple[Tensor, ...],
    pos_iou: float,
    neg_low: float,
    neg_high: float,
    min_pos_iou: float,
    gt_max_assign_all: bool,
    ignore_iof: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Assignment by IoU (Ren et al., 2015, https://arxiv.org/abs/1506.01497).

    An anchor gets the target of its largest IoU, of equals the first, if that is at least pos_iou.
    A target whose largest IoU is at least min_pos_iou is then given to the anchor of it, of equals
    the first or with gt_max_assign_all each, also where it is 0; the last of several targets stays.
    What got none is background if its largest IoU is in [neg_low, neg_high), or where there are no
    targets, and else ignored. So is what may not be assigned: an anchor that is not inside, or of
    whose area more than ignore_iof lies in an ignored box, if that is positive.

    Shapes:
        anchors: (A, 4) xyxy. inside: (A,) which of them may be assigned, or None for all.
        labels: (B, T), negative for what is no target. targets: (B, T, 4) xyxy.
        counts: (B,) numbers of targets; rows beyond count for nothing.
        ignored: the same three of boxes to ignore, or none.
        returns: (B, A) target or -1, (B, A) label or -1, (B, A) IoU or 0, (B, A, 4) box or 0,
            (B, A) whether it is ignored.
    """
    a, t = (x.to(arithmetic_dtype(anchors, targets)) for x in (anchors, targets))
    thresholds = (pos_iou, neg_low, neg_high, min_pos_iou)
    is_out = _out(a, inside, ignored, ignore_iof, len(labels))
    target, is_ignored = _chosen(
        _columns(a), is_out, real(labels, counts), t, thresholds, gt_max_assign_all
    )
    return *told(target, a, labels, t), is_ignored


def _chosen(
    box: Columns,
    is_out: Tensor | None,
    is_real: Tensor,
    targets: Tensor,
    thresholds: tuple[float, float, float, float],
    gt_max_assign_all: bool,
) -> tuple[Tensor, Tensor]:
    """(B, A) target or -1, and whether it is ignored."""
    pos_iou, neg_low, neg_high, min_pos_iou = thresholds
    (n_images, n_targets), n_anchors = is_real.shape, len(box[0])
    most = targets.new_full((n_images, n_anchors), -1)
    which = torch.full_like(most, -1, dtype=torch.int64)
    taken = which.clone()
    for some in parts(n_targets if n_anchors else 0, most.numel()):
        ratio = iou(box, columns(targets[:, some].unsqueeze(2)))
        ratio.masked_fill_(~is_real[:, some].unsqueeze(2), -1)
        if is_out is not None:
            ratio.masked_fill_(is_out.unsqueeze(1), -1)
        largest, index = ratio.max(1)
        which = torch.where(largest > most, index + some.start, which)
        most = torch.maximum(largest, most)
        highest, anchor = ratio.max(2, keepdim=True)
        index = torch.arange(n_targets, device=targets.device)[some].unsqueeze(1)
        index = torch.where(highest >= min_pos_iou, index, -1)
        if gt_max_assign_all:
            taken = torch.maximum(taken, torch.where(ratio == highest, index, -1).amax(1))
        else:
            taken.scatter_reduce_(1, anchor.squeeze(2), index.squeeze(2), "amax")
    target = torch.where(taken >= 0, taken, which.masked_fill(most < pos_iou, -1))
    is_background = ((most >= neg_low) & (most < neg_high)) | ~is_real.any(1, keepdim=True)
    is_ignored = ~is_background if is_out is None else ~is_background | is_out
    return target, is_ignored & (target < 0)


def _columns(anchors: Tensor) -> Columns:
    """Each of its own memory, which a CPU reads several times as fast."""
    return columns(anchors.T.contiguous().T)


def _out(
    anchors: Tensor, inside: Tensor | None, ignored: tuple[Tensor, ...], ignore_iof: float, n: int
) -> Tensor | None:
    """(n, A) which anchors may not be assigned, image by image; None if all may."""
    is_out = None if inside is None else (~inside).repeat(n, 1)
    if len(ignored) == 0 or ignore_iof <= 0:
        return is_out
    labels, boxes, counts = ignored
    is_real = real(labels, counts).unsqueeze(2)
    if is_out is None:
        is_out = is_real.new_zeros(n, len(anchors))
    box = _columns(anchors)
    for some in parts(labels.shape[1], is_out.numel()):
        crowd = columns(boxes[:, some].to(anchors.dtype).unsqueeze(2))
        part = overlap(box, crowd) / area(box).clamp(min=IOU_EPS)
        is_out |= ((part > ignore_iof) & is_real[:, some]).any(1)
    return is_out


@assign_max_iou.shaped_as
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = nothing(
        len(given.anchors), given.targets.to(arithmetic_dtype(given.anchors, given.targets))
    )
    return *found, torch.zeros_like(found[0], dtype=torch.bool)


@assign_max_iou.triton
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n_images, n_targets), n_anchors = given.labels.shape, len(given.anchors)
    told = unwritten(n_anchors, given.targets)
    is_ignored = torch.empty_like(told[0], dtype=torch.bool)
    if told[0].numel() == 0:
        return *told, is_ignored
    ratio = told[2].new_empty((n_images, n_targets, n_anchors))
    highest = torch.zeros_like(given.labels, dtype=torch.int64)
    n_blocks = -(-n_anchors // _BLOCK)
    has_crowd = len(given.ignored) > 0 and given.ignore_iof > 0
    shared = {
        "anchors": strided(given.anchors),
        "inside": strided(given.inside),
        "targets": (
            given.labels.contiguous(),
            given.targets.contiguous(),
            given.counts.contiguous(),
        ),
        "crowd": tuple(x.contiguous() for x in given.ignored) if has_crowd else None,
        "p_ratio": ratio,
        "p_highest": highest,
        "n_targets": n_targets,
        "n_crowd": given.ignored[0].shape[1] if has_crowd else 0,
        "n_anchors": n_anchors,
        "n_blocks": n_blocks,
        "IGNORE": float(given.ignore_iof),
        "EPS": IOU_EPS,
        "BA": _BLOCK,
    }
    if n_targets > 0:
        backend.launch(
            kernels.max_iou.overlaps_kernel,
            (n_images * -(-n_targets // _TARGETS) * n_blocks,),
            given.anchors.device,
            **shared,
            BT=_TARGETS,
        )
    backend.launch(
        kernels.max_iou.winners_kernel,
        (n_images * n_blocks,),
        given.anchors.device,
        **shared,
        told=told,
        p_ignored=is_ignored,
        THRESHOLDS=tuple(
            map(float, (given.pos_iou, given.neg_low, given.neg_high, given.min_pos_iou))
        ),
        ALL=bool(given.gt_max_assign_all),
    )
    return *told, is_ignored
