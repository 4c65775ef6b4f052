"""Task-aligned matching: which target each anchor of a dense head gets. No gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, columns, from_ltrb, ltrb, overlap
from detloss_triton.engine import Sample, direct, power_of_2, slices, strided
from detloss_triton.precision import arithmetic_dtype, at_least_float32

from .regression import YOLOV9_EPS, added_iou, centre_term, ciou

# Keeps a score finite where the largest metric of a target is 0.
_METRIC_EPS = 1e-9
# Anchors that a program takes, and the targets it compares them with, one after the other.
_BLOCK, _TARGETS = 256, 8
# Anchors of a target that a program holds at a time; what it runs through lies in the cache.
_WIDE_BLOCK = 1024


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_targets, n_classes, stride = 2, 6, 4, 8.0
    sizes = rows - rows // 3 - rows // 7, rows // 3, rows // 7
    low = torch.rand(n_images, n_targets, 2, generator=generator) * 40
    high = low + 4 + torch.rand(n_images, n_targets, 2, generator=generator) * 30
    label = torch.randint(0, n_classes, (n_images, n_targets, 1), generator=generator)
    targets = torch.cat([label, low, high], -1)
    # None of the classes; and what is equal, so that anchors and targets tie.
    targets[:, 1, 0], targets[0, 2, 0], targets[1, 2, 0] = -1, n_classes, 10000
    targets[1, 4] = targets[1, 3]
    centres = torch.rand(rows, 2, generator=generator) * 64
    points = centres + torch.rand(rows, 2, generator=generator)
    strides = torch.full((rows,), stride)
    for heads, decodes, topk, metric, rules in (
        (1, False, 3, ("iou", 1.0, 0.0), "otx"),
        (1, True, 50, ("diou", 2.0, 1.0), "otx"),
        (2, True, 5, ("ciou", 6.0, 0.5), "yolo"),
        (2, True, 10, ("ciou", 6.0, 0.5), "otx"),
    ):
        if rules == "yolo":
            # Without an anchor inside; with one on its corner; beyond the reach of some inside.
            targets[1, 0, 1:] = torch.tensor([68.0, 20.0, 80.0, 32.0])
            if rows:
                targets[0, 0, 1:3] = points[0]
                targets[0, 0, 3:] = points[0] + 30
        shape = heads * n_images, rows, 1
        which = torch.randint(0, n_targets, shape, generator=generator).expand(-1, -1, 4)
        boxes = targets[..., 1:].repeat(heads, 1, 1).gather(1, which)
        boxes += 3 * torch.randn(boxes.shape, generator=generator)
        boxes[:, rows // 2 : rows // 2 + 6] = boxes[:, rows // 2 : rows // 2 + 1]
        sides = ltrb(centres, boxes) / stride if decodes else boxes
        logits = 3 * torch.randn(*shape[:2], n_classes, generator=generator)
        levels = [
            tuple(
                level.contiguous()
                for head in x.transpose(1, 2).chunk(heads)
                for level in head.split(sizes, 2)
            )
            for x in (logits, sides)
        ]
        decoding = (centres, strides) if decodes else ()
        names = ("iou", "iou_power", "class_power", "topk", "heads", "rules", "reach")
        params = dict(zip(names, (*metric, topk, heads, rules, 2.5), strict=True))
        of_rules = (strides,) if rules == "yolo" else ()
        yield Sample((*levels, points, decoding, of_rules, targets.clone()), params)


# A graph calls it as an operator: what overlaps is looked at on a CPU, and what sorts is not for
# Inductor, as in `selection.py`.
@direct(samples=_samples, opaque=True)
def align(
    logits: tuple[Tensor, ...],
    sides: tuple[Tensor, ...],
    anchors: Tensor,
    decoding: tuple[Tensor, ...],
    strides: tuple[Tensor, ...],
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
    topk: int,
    heads: int,
    rules: str,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Task-aligned assignment (Feng et al., 2021, https://arxiv.org/abs/2108.07755) of anchors.

    metric = [anchor strictly inside target] clamp(IoU, 0, 1)^iou_power p_label^class_power. Each
    target keeps the topk anchors of largest metric above 0, of equals the first. An anchor kept by
    several gets the one with its largest metric, of equals the first; none where a metric is NaN.
    score = metric / (largest metric of the target + 1e-9) * largest IoU of the target.

    With rules "yolo", inside is >=, of an anchor from which no side of the target is farther than
    `reach` of its strides. A target that keeps no anchor keeps that of largest metric above 0,
    wherever it lies, of equals the first. An anchor kept by several gets the one with its largest
    IoU, of equals the first; a metric of NaN is never one. The score takes metric and IoU from what
    the target has got, and is NaN where the target has a NaN with any anchor.

    Args:
        iou: "iou", "diou" or "ciou".
        heads: each is matched by its own predictions.
        rules: "otx" or "yolo", by which the IoU's denominators have 1e-9 or 1e-7 added, too.

    Shapes:
        logits: (B, C, n) of each level, head after head, n anchors with a sum of A over a head.
        sides: (B, 4, n) of each level, ltrb distances in strides.
        anchors: (A, 2), what is to lie inside.
        decoding: centres (A, 2) and strides (A,), by which sides are decoded; if empty, sides are
            boxes xyxy.
        strides: (A,) for "yolo"; empty for "otx".
        targets: (B, T, 5) rows [class, x1, y1, x2, y2]; one of no class matches nothing.
        returns: (heads * B, A) index of each anchor's target, -1 for none; and (heads * B, A) its
            score, 0 for none.
    """
    dtype = arithmetic_dtype(*logits, *sides, targets)
    boxes = _boxes(sides, decoding, heads).to(dtype)
    n_images = len(targets)
    label, of_target = _by_part(targets, logits[0].shape[1])
    image = torch.arange(n_images, device=targets.device).unsqueeze(1)
    of_label = _joined([x[image, label] for x in logits], heads).to(dtype)
    t = columns(of_target.to(dtype).repeat(heads, 1, 1).unsqueeze(2))
    score = _similarity(_columns(boxes.unsqueeze(2).unbind(1)), t, iou, rules)
    metric = _metric(score, of_label, iou_power, class_power, rules)
    if metric.numel() == 0:
        return _nothing(heads * n_images, anchors, dtype)
    limits = [reach * x.to(dtype) for x in strides]
    inside = metric.masked_fill(~_is_inside(anchors.to(dtype).unbind(-1), t, *limits), 0)
    top, anchor = inside.sort(dim=-1, descending=True, stable=True)
    kept = min(topk, len(anchors))
    top, anchor = top[..., :kept], anchor[..., :kept]
    if rules == "otx":
        return _winners(top, anchor, score.amax(-1), len(anchors))
    return _winners_by_iou(*_at_least_one(top, anchor, metric, score), len(anchors))


@align.on_cpu
def _(given: Any) -> tuple[Tensor, Tensor]:
    """Evaluates the pairs that overlap: the others, nearly all, have a similarity of 0."""
    dtype = arithmetic_dtype(*given.logits, *given.sides, given.targets)
    boxes = _boxes(given.sides, given.decoding, given.heads).to(dtype)
    n_images, n_targets = given.targets.shape[:2]
    n_problems, n_levels = given.heads * n_images, len(given.sides) // given.heads
    n_anchors = len(given.anchors)
    if n_problems * n_targets * n_anchors == 0:
        return _nothing(n_problems, given.anchors, dtype)
    label, of_target = _by_part(given.targets, given.logits[0].shape[1])
    points = given.anchors.to(dtype).unbind(-1)
    kept = min(given.topk, n_anchors)
    top = boxes.new_empty(n_problems, n_targets, kept)
    index = label.new_empty(top.shape)
    best = boxes.new_zeros(n_problems, n_targets)
    similar = torch.zeros_like(top)
    limits = [given.reach * x.to(dtype) for x in given.strides]
    for i, p in enumerate(boxes):
        head, image = divmod(i, n_images)
        classes = [x[image] for x in given.logits[head * n_levels : (head + 1) * n_levels]]
        t = of_target[image].to(dtype)
        for some in slices(n_targets, n_anchors):
            # An overlap of NaN is not 0, so it is evaluated and shows.
            near = overlap(_columns(p), columns(t[some].unsqueeze(1))).bool()
            target, anchor = near.nonzero(as_tuple=True)
            of_label = torch.cat([x.index_select(0, label[image, some]) for x in classes], 1)
            of_label = of_label[target, anchor].to(dtype)
            of_pair = _columns(t[some].T.index_select(1, target))
            score = _similarity(
                _columns(p.index_select(1, anchor)), of_pair, given.iou, given.rules
            )
            value = _metric(score, of_label, given.iou_power, given.class_power, given.rules)
            at = [x[anchor] for x in points]
            is_inside = _is_inside(at, of_pair, *(x[anchor] for x in limits))
            metric = boxes.new_zeros(near.shape)
            metric[target, anchor] = value.masked_fill(~is_inside, 0)
            top[i, some], index[i, some] = _largest(metric, kept)
            if given.rules == "otx":
                best[i, some].scatter_reduce_(0, target, score, "amax")
            else:
                metric[target, anchor] = value
                scores = torch.zeros_like(metric)
                scores[target, anchor] = score
                found = _at_least_one(top[i, some], index[i, some], metric, scores)
                top[i, some], index[i, some], similar[i, some], best[i, some] = found
    if given.rules == "otx":
        return _winners(top, index, best, n_anchors)
    return _winners_by_iou(top, index, similar, best, n_anchors)


def _largest(metric: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where, of equals the first; of zeros any."""
    values, index = metric.topk(min(k + 1, metric.shape[1]))
    top, index = values[:, :k], index[:, :k]
    if k < metric.shape[1]:
        least = top[:, -1]
        # A sort takes ten times as long. All are above a NaN, which is above none.
        is_clear = (least > values[:, k]) | (least == 0)
        if not is_clear.all():
            tied = ~is_clear
            by_sorting = metric[tied].sort(descending=True, stable=True)
            top[tied], index[tied] = (x[:, :k] for x in by_sorting)
    return top, index


def _winners(top: Tensor, anchor: Tensor, best: Tensor, n_anchors: int) -> tuple[Tensor, Tensor]:
    """Each anchor's target and score, of metrics and anchors (P, T, k) that targets keep.

    best: (P, T) largest IoU of each target.
    """
    n_problems, n_targets, _ = top.shape
    target = torch.arange(n_targets, device=top.device).view(1, -1, 1).expand_as(anchor).flatten(1)
    metric, anchor = top.flatten(1), anchor.flatten(1)
    largest = metric.new_zeros(n_problems, n_anchors).scatter_reduce(1, anchor, metric, "amax")
    wins = (metric > 0) & (metric == largest.gather(1, anchor))
    target = target.masked_fill(~wins, n_targets)
    first = anchor.new_full((n_problems, n_anchors), n_targets)
    first = first.scatter_reduce(1, anchor, target, "amin")
    none = first == n_targets
    index = first.masked_fill(none, 0)
    score = largest / (top[..., 0].gather(1, index) + _METRIC_EPS) * best.gather(1, index)
    return first.masked_fill(none, -1), score.masked_fill(none, 0)


def _at_least_one(
    top: Tensor, anchor: Tensor, metric: Tensor, score: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, anchors, IoUs) (..., k) that a target keeps, and the largest metric of all anchors.

    top, anchor: (..., k) metrics and anchors of the best inside. metric, score: (..., A) of all.
    """
    best, where = metric.max(-1)
    none = (best > 0) & ~(top > 0).any(-1)
    first = torch.where(none, best, top[..., 0]).unsqueeze(-1)
    top = torch.cat([first, top[..., 1:]], -1)
    first = torch.where(none, where, anchor[..., 0]).unsqueeze(-1)
    anchor = torch.cat([first, anchor[..., 1:]], -1)
    return top, anchor, score.gather(-1, anchor), best


def _winners_by_iou(
    top: Tensor, anchor: Tensor, similar: Tensor, best: Tensor, n_anchors: int
) -> tuple[Tensor, Tensor]:
    """As `_winners`, by the IoUs (P, T, k) of what is kept; scores are of what was got.

    best: (P, T) largest metric of each target, which is NaN if one of its metrics is.
    """
    n_problems, n_targets, _ = top.shape
    target = torch.arange(n_targets, device=top.device).view(1, -1, 1).expand_as(anchor).flatten(1)
    where, is_kept = anchor.flatten(1), (top > 0).flatten(1)
    iou = similar.flatten(1).masked_fill(~is_kept, -1)
    largest = top.new_full((n_problems, n_anchors), -1).scatter_reduce(1, where, iou, "amax")
    wins = is_kept & (iou == largest.gather(1, where))
    first = where.new_full((n_problems, n_anchors), n_targets)
    first = first.scatter_reduce(1, where, target.masked_fill(~wins, n_targets), "amin")
    got = (is_kept & (first.gather(1, where) == target)).view_as(top)
    most, widest = (x.masked_fill(~got, 0).amax(-1, keepdim=True) for x in (top, similar))
    most = most.masked_fill(best.isnan().unsqueeze(-1), math.nan)
    score = (top / (most + _METRIC_EPS) * widest).masked_fill(~got, 0).flatten(1)
    score = score.new_zeros(n_problems, n_anchors).scatter_reduce(1, where, score, "amax")
    return first.masked_fill(first == n_targets, -1), score


def _nothing(n_problems: int, anchors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = n_problems, len(anchors)
    return (
        anchors.new_full(shape, -1, dtype=torch.int64),
        anchors.new_zeros(shape, dtype=dtype),
    )


def _joined(levels: Sequence[Tensor], heads: int) -> Tensor:
    """(heads * B, features, A) of the levels (B, features, n) of each head."""
    n = len(levels) // heads
    return torch.cat([torch.cat([*levels[i * n : (i + 1) * n]], 2) for i in range(heads)])


def _boxes(sides: Sequence[Tensor], decoding: Sequence[Tensor], heads: int) -> Tensor:
    """(heads * B, 4, A) xyxy."""
    joined = _joined(sides, heads)
    return from_ltrb(joined, *decoding) if decoding else joined


def _by_part(targets: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Labels (B, T) that are classes, and boxes (B, T, 4)."""
    return targets[..., 0].long().clamp(0, n_classes - 1), real_boxes(targets, n_classes)


def real_boxes(targets: Tensor, n_classes: int) -> Tensor:
    """(B, T, 4) float32 boxes of (B, T, 5) rows [class, box]; one of no class has no area."""
    boxes = at_least_float32(targets[..., 1:])
    is_class = (targets[..., :1] >= 0) & (targets[..., :1] < n_classes)
    return boxes.masked_fill(~is_class, 0)


def _is_inside(points: Sequence[Tensor], t: Columns, limit: Tensor | None = None) -> Tensor:
    """Whether points lie strictly inside; with a limit also on an edge, but not beyond it."""
    x, y = points
    if limit is None:
        return (x > t[0]) & (y > t[1]) & (x < t[2]) & (y < t[3])
    sides = x - t[0], y - t[1], t[2] - x, t[3] - y
    left, top, right, bottom = ((side >= 0) & (side <= limit) for side in sides)
    return left & top & right & bottom


def _similarity(p: Columns, t: Columns, iou: str, rules: str) -> Tensor:
    """In [0, 1], of pairs one by one or of all with all."""
    return _SIMILARITY[iou](p, t, YOLOV9_EPS[rules]).clamp(0, 1)


def _metric(
    score: Tensor, of_label: Tensor, iou_power: float, class_power: float, rules: str
) -> Tensor:
    metric = _power(score, iou_power) * of_label.sigmoid().pow(class_power)
    # Nor is it NaN without an overlap: the target would show it, and a CPU does not look there.
    return metric if rules == "otx" else metric.masked_fill(score == 0, 0)


def _columns(boxes: Iterable[Tensor]) -> Columns:
    x1, y1, x2, y2 = boxes
    return x1, y1, x2, y2


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent; even ones by a square, since torch is slow beyond the cube."""
    return x.square().pow(exponent / 2) if exponent % 2 == 0 else x.pow(exponent)


_SIMILARITY = {
    "iou": added_iou,
    "diou": lambda p, t, eps: added_iou(p, t, eps) - centre_term(p, t, eps),
    "ciou": lambda p, t, eps: ciou(p, t, eps, alpha_grad=False),
}


@align.triton
def _(given: Any) -> tuple[Tensor, Tensor]:
    n_images, n_targets = given.targets.shape[:2]
    n_problems, n_anchors = given.heads * n_images, len(given.anchors)
    if n_problems * n_targets * n_anchors == 0:
        return _nothing(n_problems, given.anchors, torch.float32)
    sizes = tuple(x.shape[2] for x in given.sides[: len(given.sides) // given.heads])
    n_blocks = sum(-(-n // _BLOCK) for n in sizes)
    score = given.anchors.new_empty((n_problems, n_anchors), dtype=torch.float32)
    target = score.new_empty(score.shape, dtype=torch.int64)
    key = torch.empty_like(target)
    metric = score.new_empty((n_problems, n_targets, n_anchors))
    best = score.new_empty((n_problems, n_targets, n_blocks))
    scale = score.new_empty((n_problems, n_targets, 2))
    by_iou = given.rules == "yolo"
    kept = None
    if by_iou:
        best = torch.empty_like(best, dtype=torch.int64)
        kept = best.new_empty((n_problems, n_targets, min(given.topk, n_anchors)))
    metric_of = (
        given.iou,
        YOLOV9_EPS[given.rules],
        float(given.iou_power),
        float(given.class_power),
        float(given.reach),
    )
    of_sides = {
        "sides": _with_strides(_of_one_dtype(given.sides)),
        "sizes": sizes,
        "decoding": _with_strides(given.decoding) if given.decoding else None,
    }
    of_targets = {
        "targets": strided(given.targets, 1),
        "s_image": given.targets.stride(0),
        "n_images": n_images,
        "n_targets": n_targets,
        "n_classes": given.logits[0].shape[1],
        "n_anchors": n_anchors,
        "n_blocks": n_blocks,
    }
    backend.launch(
        kernels.alignment.metric_kernel,
        (n_problems * -(-n_targets // _TARGETS) * n_blocks,),
        given.anchors.device,
        logits=_with_strides(_of_one_dtype(given.logits)),
        **of_sides,
        anchors=(strided(given.anchors), *(_with_strides(given.strides) or (None,))),
        p_metric=metric,
        p_best=best,
        p_key=key,
        **of_targets,
        METRIC=metric_of,
        BT=_TARGETS,
        BA=_BLOCK,
    )
    backend.launch(
        kernels.alignment.candidates_kernel,
        (n_problems * n_targets,),
        given.anchors.device,
        **(of_sides if by_iou else dict.fromkeys(of_sides)),
        p_metric=metric,
        p_best=best,
        p_scale=scale,
        p_key=key,
        p_kept=kept,
        **of_targets,
        topk=given.topk,
        METRIC=metric_of,
        BA=min(power_of_2(n_anchors), _WIDE_BLOCK),
    )
    backend.launch(
        kernels.alignment.winners_kernel,
        (-(-target.numel() // _BLOCK),),
        given.anchors.device,
        p_key=key,
        p_scale=scale,
        p_kept=kept,
        p_target=target,
        p_score=score,
        n_targets=n_targets,
        n_anchors=n_anchors,
        n_kept=min(given.topk, n_anchors),
        n=target.numel(),
        EPS=_METRIC_EPS,
        BA=_BLOCK,
    )
    return target, score


def _with_strides(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(map(strided, tensors))


def _of_one_dtype(levels: Sequence[Tensor]) -> Sequence[Tensor]:
    """As a kernel can choose among."""
    is_one = all(x.dtype == levels[0].dtype for x in levels)
    return levels if is_one else [x.to(torch.float32) for x in levels]
