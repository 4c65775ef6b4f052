"""Metrics and costs of pairs of predictions and targets, for matching. No gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, columns, overlap
from detloss_triton.engine import Sample, direct, slices
from detloss_triton.precision import arithmetic_dtype

from .regression import GIOU_EPS, YOLOV9_EPS, added_iou, centre_term, ciou, giou

# Added inside the logarithms of the class cost.
_LOG_EPS = 1e-8
# Anchors or queries that a program takes.
_BLOCK = 256


def _task_aligned_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def boxes(*shape: int) -> Tensor:
        low = torch.rand(*shape, 2, generator=generator) * 40
        return torch.cat([low, low + 4 + torch.rand(*shape, 2, generator=generator) * 30], -1)

    anchors = torch.rand(rows, 2, generator=generator) * 64
    pred, targets = boxes(2, rows), boxes(2, 3)
    pred[:, : rows // 4] = targets[:, :1]
    targets[1, 2] = 0.0
    logits = torch.randn(2, 3, rows, generator=generator) * 3
    for iou, iou_power, class_power in (("ciou", 6.0, 0.5), ("diou", 2.0, 1.0), ("iou", 1.0, 0.0)):
        params = {"iou": iou, "iou_power": iou_power, "class_power": class_power}
        yield Sample((pred, logits, anchors, targets), params)


@direct(samples=_task_aligned_samples)
def task_aligned(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    """Task-aligned metric (Feng et al., 2021, https://arxiv.org/abs/2108.07755) of all pairs.

    metric = [anchor strictly inside target] clamp(IoU, 0, 1)^iou_power p^class_power.

    Args:
        iou: "iou", "diou" or "ciou".

    Shapes:
        boxes (B, A, 4) xyxy, logits (B, T, A) of each target's class, anchors (A, 2) centres,
        targets (B, T, 4) xyxy. Returns the metric (B, T, A) and each target's largest clamped IoU
        over all anchors (B, T), both float32.
    """
    dtype = arithmetic_dtype(boxes, logits, targets)
    if logits.shape[2] == 0:
        return logits.to(dtype), logits.new_zeros(logits.shape[:2], dtype=dtype)
    p, t = boxes.to(dtype).unsqueeze(1), targets.to(dtype).unsqueeze(2)
    metric, score = _aligned(
        columns(p),
        columns(t),
        anchors.to(dtype).unbind(-1),
        logits.to(dtype),
        iou,
        iou_power,
        class_power,
    )
    return metric, score.amax(-1)


@task_aligned.on_cpu
def _(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    """Evaluates the pairs that overlap: the others, nearly all, have a similarity of 0."""
    dtype = arithmetic_dtype(boxes, logits, targets)
    metric = logits.new_zeros(logits.shape, dtype=dtype)
    best = logits.new_zeros(logits.shape[:2], dtype=dtype)
    points = anchors.to(dtype).unbind(-1)
    for image, (p, t) in enumerate(zip(boxes.to(dtype), targets.to(dtype), strict=True)):
        # Coordinate by coordinate in memory, for each is compared with many.
        p = p.T.contiguous()
        for some in slices(len(t), p.shape[1]):
            # An overlap of NaN is not 0, so it is evaluated and shows.
            near = overlap(_columns(p), columns(t[some].unsqueeze(1))).bool()
            target, anchor = near.nonzero(as_tuple=True)
            metric[image, some][target, anchor], score = _aligned(
                _columns(p.index_select(1, anchor)),
                _columns(t[some].T.index_select(1, target)),
                tuple(x[anchor] for x in points),
                logits[image, some][target, anchor].to(dtype),
                iou,
                iou_power,
                class_power,
            )
            best[image, some].scatter_reduce_(0, target, score, "amax")
    return metric, best


def _aligned(
    p: Columns,
    t: Columns,
    points: Sequence[Tensor],
    of_label: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    """Metric and clamped similarity of pairs, one by one or all against all."""
    score = _SIMILARITY[iou](p, t).clamp(0, 1)
    x, y = points
    inside = (x > t[0]) & (y > t[1]) & (x < t[2]) & (y < t[3])
    metric = _power(score, iou_power) * of_label.sigmoid().pow(class_power)
    return metric.masked_fill(~inside, 0), score


def _columns(boxes: Tensor) -> Columns:
    x1, y1, x2, y2 = boxes
    return x1, y1, x2, y2


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent; even ones by a square, since torch is slow beyond the cube."""
    return x.square().pow(exponent / 2) if exponent % 2 == 0 else x.pow(exponent)


_SIMILARITY = {
    "iou": lambda p, t: added_iou(p, t, YOLOV9_EPS),
    "diou": lambda p, t: added_iou(p, t, YOLOV9_EPS) - centre_term(p, t, YOLOV9_EPS),
    "ciou": lambda p, t: ciou(p, t, YOLOV9_EPS, alpha_grad=False),
}


@task_aligned.triton
def _(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    n_images, n_targets, n_anchors = logits.shape
    metric = logits.new_empty(logits.shape, dtype=torch.float32)
    if metric.numel() == 0:
        return metric, logits.new_zeros((n_images, n_targets), dtype=torch.float32)
    n_blocks = -(-n_anchors // _BLOCK)
    best = metric.new_empty((n_images, n_targets, n_blocks))
    backend.launch(
        kernels.matching.task_aligned_kernel,
        (n_images * n_targets * n_blocks,),
        boxes.device,
        boxes=(boxes, *boxes.stride()),
        logits=(logits, *logits.stride()[1:]),
        anchors=(anchors, *anchors.stride()),
        targets=(targets, *targets.stride()[1:]),
        p_metric=metric,
        p_best=best,
        s_logits=logits.stride(0),
        s_targets=targets.stride(0),
        n_targets=n_targets,
        n_anchors=n_anchors,
        n_blocks=n_blocks,
        IOU=iou,
        IOU_POWER=float(iou_power),
        CLASS_POWER=float(class_power),
        EPS=YOLOV9_EPS,
        BA=_BLOCK,
    )
    return metric, best.amax(-1)


def _cost_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def boxes(*shape: int) -> Tensor:
        return 0.1 + 0.8 * torch.rand(*shape, 4, generator=generator)

    logits = torch.randn(4, rows, 5, generator=generator) * 3
    labels = torch.randint(-1, 5, (2, 3), generator=generator)
    params = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0, "alpha": 0.25}
    yield Sample((logits, boxes(4, rows), labels, boxes(2, 3)), params | {"gamma": 2.0})
    yield Sample((logits, boxes(4, rows), labels, boxes(2, 3)), params | {"gamma": 1.5})


@direct(samples=_cost_samples)
def match_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """What it costs to match each target with each query (Carion et al., 2020; Zhang et al., 2022).

    cost_class (a (1-p)^g (-log(p + 1e-8)) - (1-a) p^g (-log(1-p + 1e-8))) + cost_bbox L1
    - cost_giou GIoU.

    Shapes:
        logits (P, Q, C), boxes (P, Q, 4) cxcywh: P = layers * B problems, layer by layer.
        labels (B, T), targets (B, T, 4) cxcywh; an impossible label costs what a logit of 0 does.
        Returns (P, T, Q), float32 (float64 for float64 inputs) whatever autocast says.
    """
    dtype = arithmetic_dtype(logits, boxes, targets)
    n_problems, n_queries, n_classes = logits.shape
    n_images = len(labels)
    layers_images = (n_problems // max(n_images, 1), n_images)
    logits, boxes = logits.unflatten(0, layers_images), boxes.unflatten(0, layers_images)
    is_class = (labels >= 0) & (labels < n_classes)
    index = labels.masked_fill(~is_class, 0).long().unsqueeze(1)
    x = logits.gather(3, index.expand(len(logits), -1, n_queries, -1)).transpose(2, 3).to(dtype)
    x = x.masked_fill(~is_class.unsqueeze(-1), 0)
    p, t = columns(boxes.to(dtype).unsqueeze(2)), columns(targets.to(dtype).unsqueeze(2))
    pos, neg = x.sigmoid(), (-x).sigmoid()
    cost = cost_class * (
        (1 - alpha) * pos.pow(gamma) * (neg + _LOG_EPS).log()
        - alpha * neg.pow(gamma) * (pos + _LOG_EPS).log()
    )
    for a, b in zip(p, t, strict=True):
        cost = cost + cost_bbox * (a - b).abs()
    cost = cost - cost_giou * giou(_corners(p), _corners(t), GIOU_EPS)
    return cost.flatten(0, 1)


@match_cost.on_cpu
def _(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Layer by layer: what a CPU holds at a time stays in its caches."""
    n_images = max(len(labels), 1)
    weights = (cost_class, cost_bbox, cost_giou, alpha, gamma)
    dtype = arithmetic_dtype(logits, boxes, targets)
    cost = boxes.new_empty((len(logits), labels.shape[1], logits.shape[1]), dtype=dtype)
    layers = zip(*(x.split(n_images) for x in (cost, logits, boxes)), strict=True)
    for out, x, box in layers:
        out.copy_(match_cost.reference(x, box, labels, targets, *weights))
    return cost


def _corners(c: Sequence[Tensor]) -> Columns:
    x, y, w, h = c
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


@match_cost.triton
def _(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    n_problems, n_queries, n_classes = logits.shape
    n_images, n_targets = labels.shape
    cost = boxes.new_empty((n_problems, n_targets, n_queries), dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    n_blocks = -(-n_queries // _BLOCK)
    backend.launch(
        kernels.matching.match_cost_kernel,
        (n_problems * n_targets * n_blocks,),
        boxes.device,
        logits=(logits, *logits.stride()),
        boxes=(boxes, *boxes.stride()),
        labels=(labels, *labels.stride()[1:]),
        targets=(targets, *targets.stride()[1:]),
        p_cost=cost,
        s_labels=labels.stride(0),
        s_targets=targets.stride(0),
        n_images=n_images,
        n_targets=n_targets,
        n_queries=n_queries,
        n_classes=n_classes,
        n_blocks=n_blocks,
        WEIGHTS=(float(cost_class), float(cost_bbox), float(cost_giou)),
        ALPHA=float(alpha),
        GAMMA=float(gamma),
        LOG_EPS=_LOG_EPS,
        GIOU_EPS=GIOU_EPS,
        BQ=_BLOCK,
    )
    return cost
