"""Costs of pairs of predictions and targets, and matches. No gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, columns
from detloss_triton.engine import ALIGNED, Sample, direct, strided
from detloss_triton.precision import arithmetic_dtype

from .regression import GIOU_EPS, UNION_EPS, giou, iou_and_union

# Added inside the logarithms of the class cost.
_LOG_EPS = 1e-8
# Queries that a program takes, and targets that it compares each of them with.
_QUERIES, _TARGETS = 128, 4
_BLOCK = 256


def _cost_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def boxes(*shape: int) -> Tensor:
        return 0.1 + 0.8 * torch.rand(*shape, 4, generator=generator)

    logits = tuple(torch.randn(2, rows, 5, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(-1, 5, (2, 3), generator=generator)
    params = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0, "alpha": 0.25}
    params |= {"softmax": False, "iou_power": -1.0}
    layers = logits, (boxes(2, rows), boxes(2, rows))
    yield Sample((*layers, labels, boxes(2, 3)), params | {"gamma": 2.0})
    for softmax, iou_power in ((True, -1.0), (False, 1.5), (True, 0.0)):
        how = {"softmax": softmax, "iou_power": iou_power, "gamma": 2.0}
        yield Sample((*layers, labels, boxes(2, 3)), params | how)
    # All layers in one tensor, image by image.
    both = [torch.stack(x, 1).unbind(1) for x in layers]
    yield Sample((*both, labels, boxes(2, 3)), params | {"gamma": 1.5})


@direct(samples=_cost_samples)
def match_cost(
    logits: tuple[Tensor, ...],
    boxes: tuple[Tensor, ...],
    labels: Tensor,
    targets: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    alpha: float,
    gamma: float,
    softmax: bool,
    iou_power: float,
) -> Tensor:
    """What it costs to match each target with each query (Carion et al., 2020; Zhang et al., 2022).

    cost_class (a (1-p)^g (-log(p + 1e-8)) - (1-a) p^g (-log(1-p + 1e-8))) + cost_bbox L1
    - cost_giou GIoU; with `softmax` the first term is -cost_class p, p of a softmax. Where
    iou_power is not negative, the cost is -p IoU^iou_power alone.

    Shapes:
        logits (B, Q, C), boxes (B, Q, 4) cxcywh: of each of L layers.
        labels (B, T), targets (B, T, 4) cxcywh; an impossible label costs what a logit of 0 does,
        under a softmax what a probability of 0 does.
        Returns (L * B, T, Q), layer by layer, float32 (float64 for float64 inputs) whatever
        autocast says.
    """
    dtype = arithmetic_dtype(*logits, *boxes, targets)
    scores, queries = torch.stack(tuple(logits)), torch.stack(tuple(boxes))
    n_layers, _, n_queries, n_classes = scores.shape
    is_class = (labels >= 0) & (labels < n_classes)
    index = labels.masked_fill(~is_class, 0).long().unsqueeze(1)
    index = index.expand(n_layers, -1, n_queries, -1)
    p, t = columns(queries.to(dtype).unsqueeze(2)), columns(targets.to(dtype).unsqueeze(2))
    if softmax:
        scores = scores.to(dtype).softmax(-1)
    x = scores.gather(3, index).transpose(2, 3).to(dtype).masked_fill(~is_class.unsqueeze(-1), 0)
    pos = x if softmax else x.sigmoid()
    if iou_power >= 0:
        overlap, _ = iou_and_union(_corners(p), _corners(t), UNION_EPS)
        return (-pos * overlap.pow(iou_power)).flatten(0, 1)
    if softmax:
        cost = -cost_class * pos
    else:
        neg = (-x).sigmoid()
        cost = cost_class * (
            (1 - alpha) * pos.pow(gamma) * (neg + _LOG_EPS).log()
            - alpha * neg.pow(gamma) * (pos + _LOG_EPS).log()
        )
    for a, b in zip(p, t, strict=True):
        cost = cost + cost_bbox * (a - b).abs()
    cost = cost - cost_giou * giou(_corners(p), _corners(t), GIOU_EPS)
    return cost.flatten(0, 1)


@match_cost.on_cpu
def _(given: Any) -> Tensor:
    """Layer by layer: what a CPU holds at a time stays in its caches."""
    (n_images, n_queries, _), n_targets = given.logits[0].shape, given.labels.shape[1]
    dtype = arithmetic_dtype(*given.logits, *given.boxes, given.targets)
    cost = given.boxes[0].new_empty(
        (len(given.logits), n_images, n_targets, n_queries), dtype=dtype
    )
    for out, x, box in zip(cost, given.logits, given.boxes, strict=True):
        of_layer = {"logits": (x,), "boxes": (box,)}
        out.copy_(match_cost.reference(**{**vars(given), **of_layer}))
    return cost.flatten(0, 1)


def _corners(c: Sequence[Tensor]) -> Columns:
    x, y, w, h = c
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


@match_cost.triton
def _(given: Any) -> Tensor:
    n_images, n_queries, n_classes = given.logits[0].shape
    n_targets = given.labels.shape[1]
    shape = (len(given.logits) * n_images, n_targets, n_queries)
    cost = given.boxes[0].new_empty(shape, dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    n_blocks = -(-n_queries // _QUERIES)
    backend.launch(
        kernels.matching.match_cost_kernel,
        (len(given.logits) * n_images * -(-n_targets // _TARGETS) * n_blocks,),
        given.labels.device,
        logits=_layers(given.logits),
        boxes=_layers(given.boxes),
        labels=strided(given.labels, 1),
        targets=strided(given.targets, 1),
        p_cost=cost,
        s_labels=given.labels.stride(0),
        s_targets=given.targets.stride(0),
        n_images=n_images,
        n_targets=n_targets,
        n_queries=n_queries,
        n_classes=n_classes,
        WEIGHTS=(float(given.cost_class), float(given.cost_bbox), float(given.cost_giou)),
        CLASSES=(
            bool(given.softmax),
            float(given.alpha),
            float(given.gamma),
            _LOG_EPS,
            float(given.iou_power),
        ),
        EPS=(UNION_EPS, GIOU_EPS),
        BT=_TARGETS,
        BQ=_QUERIES,
    )
    return cost


def _layers(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """(tensor, strides) of each layer, in one way."""
    return tuple(map(strided, of_one_layout(tensors)))


def of_one_layout(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Layers that one body of code reads, such that steps of one shape compile one kernel.

    Where queries lie behind denoising ones, the number of these, which changes from step to step,
    says where they begin and how far images are apart. What Triton then compiles anew for is
    copied: all but multiples of 16.
    """
    return tensors if are_of_one_layout(tensors) else torch.stack(tuple(tensors)).unbind()


def are_of_one_layout(tensors: Sequence[Tensor]) -> bool:
    dtype, stride = tensors[0].dtype, tensors[0].stride(2)
    for x in tensors:
        if x.dtype != dtype or x.stride(2) != stride or x.data_ptr() % ALIGNED:
            return False
        if not x.is_contiguous() and x.stride(0) % ALIGNED:
            return False
    return True


def _union_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    for n_layers, n_targets in ((5, 3), (1, 4)):
        matches = torch.randint(-1, n_targets, (n_layers, 2, rows), generator=generator)
        matches[:, :, ::4] = -1
        yield Sample((matches,), {"n_targets": n_targets})


@direct(samples=_union_samples)
def union_of_matches(matches: Tensor, n_targets: int) -> Tensor:
    """(1, B, Q) one target per query from the matches (L, B, Q) of several layers.

    A query takes the target that most layers gave it, of equals the first; -1 where none did.
    """
    _, n_images, n_queries = matches.shape
    is_none = (matches < 0) | (matches >= n_targets)
    index = matches.long().masked_fill(is_none, n_targets).permute(1, 2, 0)
    count = torch.zeros(
        n_images, n_queries, n_targets + 1, dtype=torch.int32, device=index.device
    ).scatter_add(2, index, torch.ones_like(index, dtype=torch.int32))[..., :n_targets]
    # Count first, then the lowest target: both in one number, whose maximum has no ties.
    first = torch.arange(n_targets - 1, -1, -1, device=index.device, dtype=torch.int32)
    best = (count * n_targets + first).amax(2)
    target = n_targets - 1 - best % n_targets
    return target.masked_fill(best < n_targets, -1).to(torch.int64).unsqueeze(0)


@union_of_matches.triton
def _(given: Any) -> Tensor:
    n_layers, n_images, n_queries = given.matches.shape
    union = given.matches.new_empty((1, n_images, n_queries), dtype=torch.int64)
    n_blocks = -(-n_queries // _BLOCK)
    if union.numel() > 0:
        backend.launch(
            kernels.matching.union_kernel,
            (n_images * n_blocks,),
            given.matches.device,
            matches=strided(given.matches),
            p_union=union,
            n_layers=n_layers,
            n_targets=given.n_targets,
            n_queries=n_queries,
            n_blocks=n_blocks,
            BQ=_BLOCK,
        )
    return union
