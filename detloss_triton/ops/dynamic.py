"""Assignment by least cost, of as many anchors as a target's overlaps add up to. No gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, columns
from detloss_triton.engine import Sample, direct, power_of_2, slices, strided
from detloss_triton.precision import arithmetic_dtype

from .assigning import IOU_EPS, iou, nothing, parts, real, told, told_to_few, unwritten
from .classification import dense, quality_focal

# Added to the IoU inside its logarithm.
LOG_EPS = 1e-7
# What the logarithms of a binary cross-entropy are at least, as torch's.
LOWEST_LOG = -100.0
# A cost counts as this at most; and as much is added where an anchor is not inside and near.
HIGHEST_COST = 1e5
# Of |s - p| in the class cost of soft labels.
SOFT_POWER = 2.0
# Of an anchor's bids, integers that add up in any order: one bid, beside the index of its target.
BID = 2**32
# Anchors that a program takes, classes at a time, and targets one after the other.
_BLOCK, _CLASSES, _TARGETS = 128, 32, 8
# Anchors of a target that a program holds at a time; what it runs through lies in the cache.
_WIDE_BLOCK = 1024


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_targets, n_classes = 2, 7, 5
    low = torch.rand(n_images, n_targets, 2, generator=generator) * 40
    targets = torch.cat([low, low + 4 + 20 * torch.rand(low.shape, generator=generator)], -1)
    labels = torch.randint(0, n_classes, (n_images, n_targets), generator=generator)
    # None of the classes, what is equal, of no size, and behind the last.
    labels[0, 1], labels[1, 2] = -1, n_classes
    targets[0, 4], labels[0, 4] = targets[0, 3], labels[0, 3]
    targets[1, 0, 2:] = targets[1, 0, :2]
    counts = torch.tensor([n_targets, n_targets - 1])
    centres = 64 * torch.rand(rows, 2, generator=generator)
    strides = torch.full_like(centres, 8.0)
    strides[rows // 2 :] = 4.0
    points = torch.cat([centres, strides], 1)
    which = torch.randint(0, n_targets, (n_images, rows, 1), generator=generator)
    boxes = targets.gather(1, which.expand(-1, -1, 4))
    boxes = boxes + 3 * torch.randn(boxes.shape, generator=generator)
    logits = 2 * torch.randn(n_images, rows, n_classes, generator=generator)
    objectness = torch.randn(n_images, rows, generator=generator)
    given = boxes, points, labels, targets, counts
    names = ("cost", "radius", "iou_weight", "class_weight", "topk")
    for cost, scores, numbers in (
        ("simota", objectness, (2.5, 3.0, 1.0, 10)),
        ("simota", None, (0.5, 1.0, 2.0, 3)),
        ("soft_label", None, (3.0, 3.0, 1.0, 13)),
    ):
        params = dict(zip(names, (cost, *numbers), strict=True))
        yield Sample((logits, scores, *given), params)


@direct(samples=_samples, opaque=True)
def assign_dynamic(
    logits: Tensor,
    objectness: Tensor | None,
    boxes: Tensor,
    points: Tensor,
    labels: Tensor,
    targets: Tensor,
    counts: Tensor,
    cost: str,
    radius: float,
    iou_weight: float,
    class_weight: float,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dynamic-k assignment: SimOTA (Ge et al., 2021, https://arxiv.org/abs/2107.08430), or that of
    RTMDet (Lyu et al., 2022, https://arxiv.org/abs/2212.07784) with soft labels.

    Candidates are the anchors inside some target or, of "simota", near the centre of some: nearer
    than `radius` strides on both axes. Each target bids for its k candidates of least cost,
    k = max(1, floor(sum of its topk largest IoUs)), and an anchor with several bids gets the target
    of least cost of all. Of equal costs the first anchor or target is taken.

    cost = class_weight * class + iou_weight * -log(IoU + 1e-7) + prior, where

    - "simota": class = BCE(p, one-hot), p = sqrt(sigmoid(logits) sigmoid(objectness)) or, without
      objectness, sigmoid(logits); prior = 1e5 where the anchor is not both inside the target and
      near its centre, else 0.
    - "soft_label": class = BCE(sigmoid(logits), s) |s - sigmoid(logits)|^2, s = IoU at the label,
      else 0; prior = 10^(distance of the centres in strides - radius).

    A cost, without the 1e5, counts as 1e5 at most, and as that where it is NaN; a NaN IoU as 0.

    Shapes:
        logits: (B, A, C). objectness: (B, A), logits too, or None.
        boxes: (B, A, 4) predicted, xyxy. points: (A, 4) rows [x, y, stride in x, stride in y].
        labels: (B, T); a target of none of the C classes gets nothing. targets: (B, T, 4) xyxy.
        counts: (B,) numbers of targets; rows beyond are not read.
        returns: (B, A) target or -1, (B, A) label or -1, (B, A) IoU or 0, (B, A, 4) box or 0.
    """
    dtype = arithmetic_dtype(logits, boxes, targets)
    (n_images, n_anchors, n_classes), n_targets = logits.shape, labels.shape[1]
    x, p, t = (x.to(dtype) for x in (logits, boxes, targets))
    o = None if objectness is None else objectness.to(dtype)
    if n_images * n_targets * n_anchors == 0:
        return nothing(n_anchors, t)
    is_real = real(labels, counts) & (labels < n_classes)
    at = _columns(points, dtype)
    is_candidate = _candidates(at, t, is_real, cost, radius)
    # Over the classes, as if none was the label, which alone differs from target to target.
    elsewhere = x.new_empty(n_images, n_anchors)
    for some in slices(n_images, n_anchors * n_classes):
        elsewhere[some] = _elsewhere(x[some], None if o is None else o[some], cost).sum(-1)

    bids = torch.zeros_like(is_candidate, dtype=torch.int64)
    cheapest = torch.zeros_like(bids)
    least = x.new_full(bids.shape, torch.inf, dtype=torch.float64)
    for some in parts(n_targets, bids.numel()):
        box = columns(t[:, some].unsqueeze(2))
        overlap = iou(columns(p.unsqueeze(1)), box)
        label = labels[:, some].long().clamp(0, n_classes - 1).unsqueeze(1)
        at_label = x.gather(2, label.expand(-1, n_anchors, -1)).transpose(1, 2)
        at_label = _at_label(at_label, None if o is None else o.unsqueeze(1), overlap, cost)
        price = class_weight * (elsewhere.unsqueeze(1) + at_label)
        price = price - iou_weight * (overlap + LOG_EPS).log()
        if cost == "soft_label":
            price = price + 10 ** (_distance(at, box) - radius)
        # In float64 nothing is rounded away by what is added then.
        price = price.nan_to_num(nan=HIGHEST_COST).clamp(0, HIGHEST_COST).double()
        if cost == "simota":
            price = price + HIGHEST_COST * ~(_inside(at, box) & _near(at, box, radius))
        apart = ~(is_real[:, some].unsqueeze(2) & is_candidate.unsqueeze(1))
        price = price.masked_fill_(apart, torch.inf)

        lowest, which = price.min(1)
        cheapest = torch.where(lowest < least, which + some.start, cheapest)
        least = torch.minimum(lowest, least)
        target = torch.arange(n_targets, device=x.device)[some]
        most = min(topk, n_anchors)
        # Added one by one from the largest, as the kernel does: what rounds a sum changes k.
        largest = overlap.masked_fill_(apart, 0).topk(most).values.unbind(-1)
        k = torch.stack(largest).cumsum(0)[-1].long().clamp(min=1)
        for i in range(most):
            # Of equal ones the first, which `topk` does not promise.
            anchor = price.argmin(-1, keepdim=True)
            is_bid = (i < k) & price.gather(-1, anchor).squeeze(-1).isfinite()
            bids.scatter_add_(1, anchor.squeeze(-1), (BID + target) * is_bid)
            price.scatter_(-1, anchor, torch.inf)
    target = torch.where(bids < 2 * BID, bids % BID, cheapest).masked_fill(bids == 0, -1)
    return told(target, p, labels, t)


@assign_dynamic.shaped_as
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return nothing(
        given.logits.shape[1],
        given.targets.to(arithmetic_dtype(given.logits, given.boxes, given.targets)),
    )


@assign_dynamic.on_cpu
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image by image, of its targets and candidates alone, which few anchors are."""
    dtype = arithmetic_dtype(given.logits, given.boxes, given.targets)
    t = given.targets.to(dtype)
    target = torch.full((len(given.labels), len(given.points)), -1, device=t.device)
    is_real = real(given.labels, given.counts) & (given.labels < given.logits.shape[2])
    at = _columns(given.points, dtype)
    for i in range(len(given.labels)):
        which = is_real[i].nonzero().squeeze(1)
        box = t[i : i + 1, which]
        is_candidate = _candidates(at, box, is_real[i : i + 1, which], given.cost, given.radius)
        anchor = is_candidate[0].nonzero().squeeze(1)
        some = {
            "logits": given.logits[i : i + 1, anchor],
            "objectness": None if given.objectness is None else given.objectness[i : i + 1, anchor],
            "boxes": given.boxes[i : i + 1, anchor],
            "points": given.points[anchor],
            "labels": given.labels[i : i + 1, which],
            "targets": box,
            "counts": given.counts.new_full((1,), len(which)),
        }
        of_image, *_ = assign_dynamic.reference(**{**vars(given), **some})
        got = (of_image[0] >= 0).nonzero().squeeze(1)
        target[i, anchor[got]] = which[of_image[0, got]]
    return told_to_few(target, given.boxes.to(dtype), given.labels, t)


@assign_dynamic.triton
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n_images, n_anchors, n_classes), n_targets = given.logits.shape, given.labels.shape[1]
    if n_images * n_targets * n_anchors == 0:
        return nothing(n_anchors, given.targets.to(torch.float32))
    told = unwritten(n_anchors, given.targets)
    elsewhere, bids = torch.empty_like(told[2]), torch.empty_like(told[0])
    overlap = elsewhere.new_empty((n_images, n_targets, n_anchors))
    rank = torch.empty_like(overlap, dtype=torch.int32)
    n_blocks = -(-n_anchors // _BLOCK)
    of_cost = (given.radius, given.iou_weight, given.class_weight, LOG_EPS, LOWEST_LOG)
    packed = {
        "targets": (
            given.labels.contiguous(),
            given.targets.contiguous(),
            given.counts.contiguous(),
        ),
        "n_targets": n_targets,
        "n_anchors": n_anchors,
        "n_classes": n_classes,
    }
    predicted = {
        "logits": strided(given.logits),
        "objectness": strided(given.objectness),
        "points": strided(given.points),
        "p_elsewhere": elsewhere,
        "COST": (given.cost, *map(float, of_cost), HIGHEST_COST, SOFT_POWER),
    }
    of_boxes = {"boxes": strided(given.boxes), "n_blocks": n_blocks, "EPS": IOU_EPS}
    backend.launch(
        kernels.dynamic.candidates_kernel,
        (n_images * n_blocks,),
        given.boxes.device,
        **predicted,
        **packed,
        p_bids=bids,
        n_blocks=n_blocks,
        BA=_BLOCK,
        BC=min(power_of_2(n_classes), _CLASSES),
    )
    backend.launch(
        kernels.dynamic.costs_kernel,
        (n_images * -(-n_targets // _TARGETS) * n_blocks,),
        given.boxes.device,
        **predicted,
        **packed,
        **of_boxes,
        p_rank=rank,
        p_overlap=overlap,
        BT=_TARGETS,
        BA=_BLOCK,
    )
    backend.launch(
        kernels.dynamic.bids_kernel,
        (n_images * n_targets,),
        given.boxes.device,
        **packed,
        p_rank=rank,
        p_overlap=overlap,
        p_bids=bids,
        topk=given.topk,
        BID=BID,
        BA=min(power_of_2(n_anchors), _WIDE_BLOCK),
    )
    backend.launch(
        kernels.dynamic.winners_kernel,
        (n_images * n_blocks,),
        given.boxes.device,
        **packed,
        **of_boxes,
        p_rank=rank,
        p_bids=bids,
        told=told,
        BID=BID,
        BA=_BLOCK,
    )
    return told


def _columns(points: Tensor, dtype: torch.dtype) -> Columns:
    """Each of its own memory, which a CPU compares several times as fast."""
    return columns(points.to(dtype).T.contiguous().T)


def _candidates(at: Columns, targets: Tensor, is_real: Tensor, cost: str, radius: float) -> Tensor:
    """(B, A) which anchors are inside some target, or near its centre where that counts."""
    found = is_real.new_zeros(len(targets), len(at[0]))
    for some in parts(targets.shape[1], found.numel()):
        box = columns(targets[:, some].unsqueeze(2))
        here = _inside(at, box)
        if cost == "simota":
            here |= _near(at, box, radius)
        found |= (here & is_real[:, some].unsqueeze(2)).any(1)
    return found


def _inside(at: Columns, box: Columns) -> Tensor:
    x, y, _, _ = at
    return (x > box[0]) & (y > box[1]) & (x < box[2]) & (y < box[3])


def _near(at: Columns, box: Columns, radius: float) -> Tensor:
    x, y, stride_x, stride_y = at
    near_x = (x - (box[0] + box[2]) / 2).abs() < radius * stride_x
    return near_x & ((y - (box[1] + box[3]) / 2).abs() < radius * stride_y)


def _distance(at: Columns, box: Columns) -> Tensor:
    """Of the centres, in strides."""
    x, y, stride, _ = at
    across, down = x - (box[0] + box[2]) / 2, y - (box[1] + box[3]) / 2
    return (across.square() + down.square()).sqrt() / stride


def _elsewhere(x: Tensor, o: Tensor | None, cost: str) -> Tensor:
    """The class cost of each logit (..., C) as if it were not at the label."""
    if cost == "soft_label":
        return _background(x)
    return -_log(1 - _probability(x, None if o is None else o.unsqueeze(-1)))


def _at_label(x: Tensor, o: Tensor | None, overlap: Tensor, cost: str) -> Tensor:
    """What a logit costs more at the label than elsewhere."""
    if cost == "soft_label":
        here: Tensor = quality_focal.reference(*dense(x, overlap), beta=SOFT_POWER)
        return here.squeeze(-1) - _background(x)
    p = _probability(x, o)
    return _log(1 - p) - _log(p)


def _background(x: Tensor) -> Tensor:
    assert quality_focal.background is not None
    losses, _ = quality_focal.background(x, None, beta=SOFT_POWER)
    return losses


def _probability(x: Tensor, o: Tensor | None) -> Tensor:
    return x.sigmoid() if o is None else (x.sigmoid() * o.sigmoid()).sqrt()


def _log(p: Tensor) -> Tensor:
    return p.log().clamp(min=LOWEST_LOG)
