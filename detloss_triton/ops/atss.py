"""Adaptive training sample selection: the anchors nearest to a target, of more than usual overlap.
No gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import columns
from detloss_triton.engine import Sample, direct, power_of_2, strided
from detloss_triton.precision import arithmetic_dtype

from .assigning import IOU_EPS, iou, nothing, parts, real, told, told_to_few, unwritten

# How far inside a target an anchor's centre has to lie, in pixels.
MARGIN = 0.01
# Anchors that a program takes; and that it holds at a time of those it runs through.
_BLOCK, _WIDE_BLOCK = 128, 1024

# Of distances (B, T, n) the k least of each row, of equal ones the first: which columns.
Nearest = Callable[[Tensor, int], Tensor]


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_targets = 2, 7
    sizes = rows - rows // 3 - rows // 7, rows // 3, rows // 7
    centres = 64 * torch.rand(rows, 2, generator=generator)
    half = torch.cat([torch.full((n, 1), 6.0 * 2**i) for i, n in enumerate(sizes)])
    anchors = torch.cat([centres - half, centres + half], 1)
    low = 40 * torch.rand(n_images, n_targets, 2, generator=generator)
    targets = torch.cat([low, low + 4 + 20 * torch.rand(low.shape, generator=generator)], -1)
    labels = torch.randint(0, 5, (n_images, n_targets), generator=generator)
    # No label, what is equal, of no size, and behind the last; and anchors that tie.
    labels[0, 1] = -1
    targets[0, 4], targets[1, 0, 2:] = targets[0, 3], targets[1, 0, :2]
    anchors[1:5] = anchors[:1]
    counts = torch.tensor([n_targets, n_targets - 1])
    inside = torch.rand(rows, generator=generator) > 0.3
    for flags, topk in ((None, 9), (inside, 3)):
        yield Sample((anchors, flags, labels, targets, counts), {"sizes": sizes, "topk": topk})


@direct(samples=_samples, opaque=True)
def assign_atss(
    anchors: Tensor,
    inside: Tensor | None,
    labels: Tensor,
    targets: Tensor,
    counts: Tensor,
    sizes: tuple[int, ...],
    topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ATSS (Zhang et al., 2020, https://arxiv.org/abs/1912.02424).

    Candidates of a target are, of each level, the topk anchors whose centres are nearest to its
    own, of equals the first. It bids for those whose IoU is at least the mean plus the standard
    deviation (unbiased, so that one candidate alone has none, and is not bid for) of its
    candidates', and whose centres lie inside it by more than 0.01 pixels. An anchor gets the bid
    of largest IoU, of equals the first.

    Shapes:
        anchors: (A, 4) xyxy, level by level. inside: (A,) which of them may be candidates, or None.
        labels: (B, T), negative for what is no target. targets: (B, T, 4) xyxy.
        counts: (B,) numbers of targets; rows beyond count for nothing.
        sizes: anchors of each level, A in all.
        returns: (B, A) target or -1, (B, A) label or -1, (B, A) IoU or 0, (B, A, 4) box or 0.
    """
    a, t = (x.to(arithmetic_dtype(anchors, targets)) for x in (anchors, targets))
    target = _chosen(a, inside, real(labels, counts), t, sizes, topk, _by_steps)
    return told(target, a, labels, t)


@assign_atss.on_cpu
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, t = (
        x.to(arithmetic_dtype(given.anchors, given.targets)) for x in (given.anchors, given.targets)
    )
    target = _chosen(
        a, given.inside, real(given.labels, given.counts), t, given.sizes, given.topk, _by_topk
    )
    return told_to_few(target, a, given.labels, t)


@assign_atss.shaped_as
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return nothing(
        len(given.anchors), given.targets.to(arithmetic_dtype(given.anchors, given.targets))
    )


def _chosen(
    a: Tensor,
    inside: Tensor | None,
    is_real: Tensor,
    t: Tensor,
    sizes: tuple[int, ...],
    topk: int,
    nearest: Nearest,
) -> Tensor:
    """(B, A) target or -1."""
    (n_images, n_targets), n_anchors = is_real.shape, len(a)
    if n_images * n_targets * n_anchors == 0:
        return torch.full((n_images, n_anchors), -1, device=a.device)
    candidates = []
    for some in parts(n_targets, n_images * n_anchors):
        distance = _distance(a, t[:, some])
        if inside is not None:
            distance = distance.masked_fill(~inside, torch.inf)
        candidates.append(_of_levels(distance, sizes, topk, nearest))
    anchor = torch.cat(candidates, 1)  # (B, T, candidates), -1 for none
    is_used = (anchor >= 0) & is_real.unsqueeze(2)
    box, of_anchor = columns(t.unsqueeze(2)), columns(a[anchor.clamp(min=0)])
    overlap = iou(of_anchor, box).masked_fill(~is_used, 0)
    x, y = (of_anchor[0] + of_anchor[2]) / 2, (of_anchor[1] + of_anchor[3]) / 2
    is_inside = (x - box[0] > MARGIN) & (y - box[1] > MARGIN)
    is_inside &= (box[2] - x > MARGIN) & (box[3] - y > MARGIN)
    bids = is_used & is_inside & (overlap >= _threshold(overlap, is_used))

    # What is not bid for goes to one more anchor, which is cut off.
    anchor = anchor.masked_fill(~bids, n_anchors).flatten(1)
    overlap = overlap.flatten(1)
    best = overlap.new_full((n_images, n_anchors + 1), -1).scatter_reduce(
        1, anchor, overlap, "amax"
    )
    index = torch.arange(n_targets, device=a.device).view(1, -1, 1).expand_as(bids).flatten(1)
    index = index.masked_fill(overlap != best.gather(1, anchor), n_targets)
    first = anchor.new_full(best.shape, n_targets).scatter_reduce(1, anchor, index, "amin")
    target = first[:, :n_anchors]
    return target.masked_fill(target == n_targets, -1)


def _distance(anchors: Tensor, targets: Tensor) -> Tensor:
    """(B, T, A) squares of the centres' distances; infinity of what is not finite."""
    x1, y1, x2, y2 = columns(anchors)
    box = columns(targets.unsqueeze(2))
    x, y = (x1 + x2) / 2 - (box[0] + box[2]) / 2, (y1 + y2) / 2 - (box[1] + box[3]) / 2
    return (x.square() + y.square()).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _of_levels(distance: Tensor, sizes: tuple[int, ...], topk: int, nearest: Nearest) -> Tensor:
    found, start = [], 0
    for level in distance.split(list(sizes), 2):
        k = min(topk, level.shape[2])
        if k > 0:
            index = nearest(level, k)
            is_none = level.gather(2, index).isinf()
            found.append((index + start).masked_fill(is_none, -1))
        start += level.shape[2]
    return torch.cat(found, 2)


def _by_steps(distance: Tensor, k: int) -> Tensor:
    found = []
    for _ in range(k):
        # Of equal ones the first, which `topk` does not promise.
        found.append(distance.argmin(2, keepdim=True))
        distance = distance.scatter(2, found[-1], torch.inf)
    return torch.cat(found, 2)


def _by_topk(distance: Tensor, k: int) -> Tensor:
    """In a quarter of the time; rows that tie at the last are sorted."""
    values, index = distance.topk(min(k + 1, distance.shape[2]), largest=False)
    index = index[..., :k]
    if k < distance.shape[2]:
        is_tied = values[..., k - 1] == values[..., k]
        if is_tied.any():
            index[is_tied] = distance[is_tied].sort(stable=True).indices[:, :k]
    return index


def _threshold(overlap: Tensor, is_used: Tensor) -> Tensor:
    """(B, T, 1) mean plus standard deviation of the entries used."""
    # From one of them on, so that of equal ones the mean is that, and the deviation 0.
    first = overlap.gather(2, is_used.long().argmax(2, keepdim=True))
    shifted = (overlap - first).masked_fill(~is_used, 0)
    n = is_used.sum(2, keepdim=True)
    total = shifted.sum(2, keepdim=True)
    variance = (shifted.square().sum(2, keepdim=True) - total.square() / n) / (n - 1)
    return first + total / n + variance.clamp(min=0).sqrt()


@assign_atss.triton
def _(given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n_images, n_targets), n_anchors = given.labels.shape, len(given.anchors)
    if n_images * n_targets * n_anchors == 0:
        return nothing(n_anchors, given.targets.to(torch.float32))
    told = unwritten(n_anchors, given.targets)
    bids = torch.zeros_like(told[0])
    n_blocks = -(-n_anchors // _BLOCK)
    shared = {
        "anchors": strided(given.anchors),
        "targets": (
            given.labels.contiguous(),
            given.targets.contiguous(),
            given.counts.contiguous(),
        ),
        "p_bids": bids,
        "n_targets": n_targets,
        "n_anchors": n_anchors,
        "EPS": IOU_EPS,
    }
    backend.launch(
        kernels.atss.bids_kernel,
        (n_images * n_targets,),
        given.anchors.device,
        **shared,
        inside=strided(given.inside),
        sizes=tuple(given.sizes),
        topk=given.topk,
        MARGIN=MARGIN,
        BK=power_of_2(len(given.sizes) * given.topk),
        BA=min(power_of_2(max(given.sizes)), _WIDE_BLOCK),
    )
    backend.launch(
        kernels.atss.winners_kernel,
        (n_images * n_blocks,),
        given.anchors.device,
        **shared,
        told=told,
        n_blocks=n_blocks,
        BA=_BLOCK,
    )
    return told
