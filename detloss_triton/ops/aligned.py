"""All terms of anchors matched to targets, over heads and feature levels: YOLOv9's losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.boxes import ltrb
from detloss_triton.engine import (
    OWN_SUM,
    OWN_SUM_OR_1,
    TILE,
    Plan,
    Sample,
    fused_op,
    power_of_2,
    row_shape,
    strided,
)
from detloss_triton.precision import arithmetic_dtype, at_least_float32

from .classification import binary_cross_entropy
from .coding import distance_decode
from .distribution import BIN_MARGIN, MAX_BINS, two_bin, two_bins
from .regression import YOLOV9_EPS, ciou_loss

# Classes that a program takes at a time.
_COLUMNS = 16


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_targets, stride = 2, 5, 8.0
    sizes = rows - rows // 3 - rows // 7, rows // 3, rows // 7
    centres = torch.rand(rows, 2, generator=generator) * 64
    low = torch.rand(n_images, n_targets, 2, generator=generator) * 40
    high = low + 4 + torch.rand(n_images, n_targets, 2, generator=generator) * 30
    label = torch.arange(n_images * n_targets).view(n_images, n_targets, 1) % 4
    targets = torch.cat([label, low, high], -1)
    targets[0, 1, 0], targets[1, 2, 0] = -1, 10000  # none of the classes
    for heads, n_classes, bins, n_matched, rules in (
        (1, 6, 5, rows // 4, "otx"),
        (1, 7, 16, 0, "otx"),
        (2, 5, 6, 1, "yolo"),
        (2, 16, 16, 9, "otx"),
    ):
        shape = heads * n_images, rows
        target = torch.randint(0, n_targets, shape, generator=generator)
        is_matched = torch.rand(shape, generator=generator).argsort(1) < n_matched
        target = target.masked_fill(~is_matched, -1)
        score = torch.rand(shape, generator=generator) * is_matched
        which = target.clamp(min=0).unsqueeze(2).expand(-1, -1, 4)
        boxes = targets[..., 1:].repeat(heads, 1, 1).gather(1, which)
        boxes = boxes + 3 * torch.randn(boxes.shape, generator=generator)
        predictions = (
            torch.randn(*shape, n_classes, generator=generator) * 3,
            torch.randn(*shape, 4, bins, generator=generator),
            ltrb(centres, boxes) / stride,
        )
        levels = [
            tuple(
                level.contiguous()
                for head in x.chunk(heads)
                for level in head.split(list(sizes), 1)
            )
            for x in predictions
        ]
        anchors = centres, torch.full((rows,), stride)
        yield Sample(
            (*levels, (target,), (score,), anchors, (targets,)),
            {"factors": (0.5, 1.5, 7.5), "topk": rows, "heads": heads, "rules": rules},
        )


@fused_op(
    levels=("logits", "distributions", "distances"),
    gradients=("logits", "distributions", "distances"),
    samples=_samples,
    maps={"logits": 3, "distributions": 4, "distances": 3},
)
def aligned(
    logits: tuple[Tensor, ...],
    distributions: tuple[Tensor, ...],
    distances: tuple[Tensor, ...],
    target: tuple[Tensor, ...],
    score: tuple[Tensor, ...],
    anchors: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    factors: tuple[float, ...],
    topk: int,
    heads: int,
    rules: str,
) -> Tensor:
    """Losses (3 * heads,) of what `align` has matched: classes, distributions and boxes, by heads.

    Classes cost their binary cross-entropy with the target's class at the anchor's score; sides the
    cross-entropy of the two bins beside their distance, in strides; boxes 1 - CIoU. A box weighs
    its score, as do its four sides together. All are divided by the sum of the head's scores, or 1
    where that is not above 0; with rules "yolo" where it is less. An anchor whose target does not
    exist, or is of none of the classes, is background.

    Args:
        factors: of each of the three.
        topk: how many anchors a target has at most.
        rules: "otx" or "yolo", by which the CIoU's denominators have 1e-9 or 1e-7 added, and its
            alpha is differentiated or a constant, too.

    Shapes:
        logits (B, n, C), distributions (B, n, 4, bins) and distances (B, n, 4) of each level, head
            after head, n anchors with a sum of A over a head; or the maps (B, C, h, w),
        (B, bins, 4, h, w) and (B, 4, h, w). Distances are ltrb in strides.
        target, score: one (heads * B, A) each.
        anchors: centres (A, 2) and strides (A,) in pixels.
        targets: one (B, T, 5) of rows [class, x1, y1, x2, y2] in pixels, T > 0.
    """
    index, (objects,) = target[0].long(), targets
    given = score[0].to(arithmetic_dtype(*logits, *distributions, *distances))
    label = _labels(index, objects, logits[0].shape[2], heads)
    given = given.masked_fill(label < 0, 0)
    norm = class_norm(_by_head(given, heads).sum((1, 2)), rules)
    # As many pairs as there can be, the others with a score of 0.
    most = min(objects.shape[1] * topk, given.shape[1])
    weight, anchor = given.topk(most)
    index = index.gather(1, anchor).clamp(0, objects.shape[1] - 1)
    boxes = at_least_float32(objects[..., 1:]).to(weight.dtype).repeat(heads, 1, 1)
    boxes = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
    # The quotient of two integers would be in torch's default dtype.
    stride = anchors[1][anchor].unsqueeze(-1).to(boxes.dtype)
    centre, boxes = anchors[0][anchor] / stride, boxes / stride
    losses = (
        _class_loss(logits, label, given, heads),
        _distribution_loss(_picked(distributions, anchor, heads), centre, boxes, weight, heads),
        ciou_loss(
            _by_head(distance_decode(_picked(distances, anchor, heads), centre), heads),
            _by_head(boxes, heads),
            weight=_by_head(weight, heads),
            keep=1,
            eps=YOLOV9_EPS[rules],
            alpha_grad=rules == "otx",
        ),
    )
    return torch.cat([x * (factor / norm) for x, factor in zip(losses, factors, strict=True)])


def class_norm(scores: Tensor, rules: str) -> Tensor:
    """What losses are divided by, of sums of scores."""
    return scores.masked_fill(~(scores > 0), 1) if rules == "otx" else scores.clamp(min=1)


def _labels(target: Tensor, objects: Tensor, n_classes: int, heads: int) -> Tensor:
    """(heads * B, A) the class of each anchor's target, -1 for none."""
    value = objects[..., 0]
    is_class = (value >= 0) & (value < n_classes)
    label = value.long().masked_fill(~is_class, -1).repeat(heads, 1)
    exists = (target >= 0) & (target < objects.shape[1])
    return label.gather(1, target.masked_fill(~exists, 0)).masked_fill(~exists, -1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(heads * B, ...) as (heads, B, ...), also where B is 0."""
    return x.unflatten(0, (heads, len(x) // heads))


def _class_loss(logits: Sequence[Tensor], label: Tensor, score: Tensor, heads: int) -> Tensor:
    """Of each head, level by level."""
    n_levels = len(logits) // heads
    sizes = [level.shape[1] for level in logits]
    out = []
    for h, rows in enumerate(zip(_by_head(label, heads), _by_head(score, heads), strict=True)):
        some = slice(h * n_levels, (h + 1) * n_levels)
        by_level = zip(logits[some], *(x.split(sizes[some], 1) for x in rows), strict=True)
        out.append(torch.stack([binary_cross_entropy(*level, None) for level in by_level]).sum())
    return torch.stack(out)


def _distribution_loss(
    logits: Tensor, centre: Tensor, boxes: Tensor, weight: Tensor, heads: int
) -> Tensor:
    left, right_weight = two_bins(ltrb(centre, boxes), logits.shape[-1])
    weight = (weight / 4).unsqueeze(-1).expand(left.shape)
    rows = (logits, left, 1 - right_weight, right_weight, weight)
    *inputs, weight = (_by_head(x, heads) for x in rows)
    return two_bin(*inputs, weight=weight, keep=1)


def _picked(levels: Sequence[Tensor], anchor: Tensor, heads: int) -> Tensor:
    """Features (heads * B, M, ...) of some anchors of the levels (B, n, ...) of each head."""
    n = len(levels) // heads
    by_head = _by_head(anchor, heads)
    return torch.cat([_at(levels[h * n : (h + 1) * n], by_head[h]) for h in range(heads)])


def _at(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """Features (B, M, ...) of some anchors of an image, without joining its levels (B, n, ...).

    index: (B, M) into the joined anchors.
    """
    # As they are in memory, anchors last: their gradients then need no copy.
    dims = 0, *range(levels[0].dim() - 1, 0, -1)
    out: Tensor | None = None
    start = 0
    for level in (x.permute(dims) for x in levels if x.shape[1]):
        n = level.shape[-1]
        local = index - start
        outside = (local < 0) | (local >= n)
        shape = (len(index), *(1,) * (level.dim() - 2), index.shape[1])
        where = local.masked_fill(outside, 0).view(shape)
        found = level.gather(-1, where.expand(*level.shape[:-1], -1))
        out = found if out is None else torch.where(outside.view(shape), out, found)
        start += n
    # Also what is empty has a gradient.
    empty = [x.sum() for x in levels if not x.shape[1]]
    if out is None:
        return torch.cat(list(levels), 1)
    return sum(empty, out.permute(dims))


@aligned.limited
def _(*tensors: Tensor | None) -> str:
    # Of those with features of two dimensions.
    widest = max(x.dim() for x in tensors if x is not None)
    bins = max(row_shape(x, 4)[3] for x in tensors if x is not None and x.dim() == widest)
    return f"distributions may have up to {MAX_BINS} bins, got {bins}" if bins > MAX_BINS else ""


@aligned.triton
def _(given: Any) -> Plan:
    n_levels, n_images = len(given.logits) // given.heads, len(given.logits[0])
    sizes = tuple(row_shape(level, 3)[1] for level in given.logits)
    n_classes, n_bins = row_shape(given.logits[0], 3)[2], row_shape(given.distributions[0], 4)[3]
    columns, bins = min(power_of_2(n_classes), _COLUMNS), power_of_2(n_bins)
    # An eighth of a tile in one warp takes 80 to 90 registers; more rows spill on some GPUs.
    rows = max(TILE // 8 // max(columns, bins, _COLUMNS), 1)
    blocks = [-(-n // rows) for n in sizes]
    (index,), (weight,), (objects,) = given.target, given.score, given.targets
    norm = OWN_SUM if given.rules == "otx" else OWN_SUM_OR_1
    return Plan(
        kernels.aligned.aligned_kernel,
        # Divided by the fourth sum.
        terms=tuple((float(factor), norm, 3) for factor in given.factors),
        n_sums=4,
        blocks=tuple(sum(blocks[h * n_levels : (h + 1) * n_levels]) for h in range(given.heads)),
        n_repeats=n_images,
        n_segments=given.heads,
        arguments={
            "sizes": sizes,
            "target": strided(index),
            "score": strided(weight),
            "anchors": tuple(strided(x) for x in given.anchors),
            "targets": strided(objects, 1),
            "s_image": objects.stride(0),
            "n_images": n_images,
            "n_targets": objects.shape[1],
            "n_classes": n_classes,
            "BINS": (n_bins, BIN_MARGIN, bins),
            "CIOU": (YOLOV9_EPS[given.rules], given.rules == "otx"),
            "N_HEADS": given.heads,
            "BR": rows,
            "num_warps": 1,
            "BC": columns,
        },
    )
