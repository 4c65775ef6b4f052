"""All terms of anchors with a label each, over feature levels: classes, boxes, centerness."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.boxes import centerness
from detloss_triton.engine import (
    DIVISOR,
    REGISTRY,
    SUM,
    TILE,
    Plan,
    Sample,
    fused_op,
    power_of_2,
    row_shape,
)
from detloss_triton.precision import arithmetic_dtype
from detloss_triton.ranks import mean_over_ranks

from . import classification, coding, regression

# The quality of a positive whose box misses its target altogether.
MIN_QUALITY = 1e-6


def joined(levels: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, n_l, ...) of each level as one (N, n, ...)."""
    return torch.cat(list(levels), 1).to(dtype)


def is_object(labels: Tensor, num_classes: int) -> Tensor:
    """Where a label is an object's: in [0, num_classes)."""
    return (labels >= 0) & (labels < num_classes)


def row_op(name: str, constants: Sequence[float]) -> tuple[Any, dict[str, Any]]:
    """The op of a loss of classes or boxes and its parameters; "iou_loss" is named with its mode
    behind it."""
    name, _, mode = name.partition(" ")
    op: Any = REGISTRY[name]
    params = [mode, *constants] if mode else constants
    return op, dict(zip(op.parameters[len(op.inputs) :], params, strict=True))


@functools.lru_cache(64, typed=True)
def loss_of(name: str, *constants: float) -> tuple[Any, ...]:
    """What kernels call such a loss."""
    op, params = row_op(name, constants)
    inputs = [torch.empty(0, 4)] * len(op.inputs)
    loss: tuple[Any, ...] = op.launcher(op.given(*inputs, **params)).constants["LOSS"]
    return loss


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def boxes(*shape: int) -> Tensor:
        low = uniform(*shape, 2) * 40
        return torch.cat([low, low + 4 + uniform(*shape, 2) * 20], -1)

    sizes = (-(-rows // 2), rows // 5, 0)
    for classes, class_constants, box, box_constants, decode, by_iou in (
        ("quality_focal", (2.0,), "giou_loss", (1e-6,), "", False),
        ("sigmoid_focal", (0.25, 2.0), "giou_loss", (1e-6,), "deltas", False),
        ("quality_focal", (1.5,), "iou_loss log", (1e-6,), "deltas", True),
        ("binary_cross_entropy", (), "l1", (), "distances", False),
    ):
        n_images, n_classes, centred = 2, 6, decode != ""
        levels: list[tuple[Tensor, ...]] = []
        for n in sizes:
            targets = boxes(n_images, n)
            anchors = targets + (uniform(n_images, n, 4) - 0.5) * 6
            codes = torch.randn(n_images, n, 4, generator=generator)
            levels.append(
                (
                    torch.randn(n_images, n, n_classes, generator=generator) * 3,
                    torch.randint(-1, n_classes + 3, (n_images, n), generator=generator),
                    uniform(n_images, n),
                    uniform(n_images, n) * 2,
                    (uniform(n_images, n, n_classes) > 0.3).float(),
                    codes if centred else targets + codes,
                    anchors,
                    targets,
                    torch.randn(n_images, n, generator=generator),
                )
            )
        scores, labels, quality, weights, masks, codes_, anchors_, targets_, logits = zip(
            *levels, strict=True
        )
        yield Sample(
            (
                scores,
                labels,
                () if centred else quality,
                weights,
                masks if classes == "sigmoid_focal" else (),
                codes_,
                anchors_ if centred else (),
                targets_,
                logits if centred else (),
                (torch.tensor(5.0),) if by_iou else (),
            ),
            {
                "number": 7.0,
                "classes": classes,
                "class_constants": class_constants,
                "boxes": box,
                "box_constants": box_constants,
                "decode": decode,
                "decode_constants": _DECODE if decode == "deltas" else (),
                "by_iou": by_iou,
                "background": 0.3 if by_iou else -1.0,
                "factors": (1.5, 2.0, 0.5) if centred else (1.5, 2.0),
                "added": (0.0, 0.0, 2.0**-23) if centred else (0.0, 0.0),
            },
        )


_DECODE = (0.0, 0.1, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 4.135, 0.0)


@fused_op(
    levels=(
        "scores",
        "labels",
        "quality",
        "weights",
        "masks",
        "codes",
        "anchors",
        "targets",
        "logits",
    ),
    gradients=("scores", "codes", "logits"),
    samples=_samples,
    maps={"scores": 3, "codes": 3, "logits": 2},
)
def dense(
    scores: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    quality: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    masks: tuple[Tensor, ...],
    codes: tuple[Tensor, ...],
    anchors: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    logits: tuple[Tensor, ...],
    divisor: tuple[Tensor, ...],
    number: float,
    classes: str,
    class_constants: tuple[float, ...],
    boxes: str,
    box_constants: tuple[float, ...],
    decode: str,
    decode_constants: tuple[float, ...],
    by_iou: bool,
    background: float,
    factors: tuple[float, ...],
    added: tuple[float, ...],
) -> Tensor:
    """Losses (terms * L,) of L levels: their classes, their boxes and, with `logits`, centerness.

    With centerness a box weighs as much as its anchor is central, and classes and centerness are
    divided by the divisor. Without it a box weighs its quality, and classes are divided by the sum
    of qualities. Boxes are divided by the sum of their weights, as are classes the mean over ranks
    and at least 1.

    Shapes, each a tuple over levels:
        scores (N, n, C) logits; labels (N, n) in [0, C), else background; quality (N, n) targets of
        the labels, 1 if (); weights (N, n) of classes; masks (N, n, C) factors of entries, or ();
        codes (N, n, 4); anchors (N, n, 4) xyxy, () where codes are boxes; targets (N, n, 4);
        logits (N, n) of centerness, or (). Scores, codes, logits also as maps (N, features, H, W).

    Args:
        divisor: a tensor of one number, or () for `number`.
        classes, boxes, decode: names of ops and their constants.
        by_iou: a label's target is the IoU of its box.
        background: the weight of labels C, where not negative.
        factors, added: of each term: a factor of its losses, an addend to its divisor.
    """
    dtype = arithmetic_dtype(*scores, *codes, *logits)
    n_classes = scores[0].shape[-1]
    sizes = [level.shape[1] for level in scores]
    # What is small is joined: an operation on all levels costs what one on a level does.
    label = torch.cat(list(labels), 1)
    positive = is_object(label, n_classes)
    target, box = joined(targets, dtype), torch.cat(list(codes), 1)
    weight = joined(weights, dtype)
    metric = joined(quality, dtype) if quality else None
    grid = joined(anchors, dtype) if anchors else None
    if grid is not None:
        box = _decoded(box, grid, positive, decode, decode_constants)
    if logits:
        assert grid is not None
        of_boxes = centerness(grid, target).masked_fill(~positive, 0)
        (box_norm,) = mean_over_ranks(of_boxes.sum().unsqueeze(0)).unbind()
        by: float | Tensor = divisor[0].to(dtype) if divisor else number
    else:
        assert metric is not None
        of_boxes = metric.masked_fill(~positive, 0)
        norms = mean_over_ranks(torch.stack([metric.sum(), of_boxes.sum()]))
        by, box_norm = norms.clamp(min=1).unbind()
    if background >= 0:
        weight = weight.masked_fill(label == n_classes, background)
    if classes == "binary_cross_entropy":
        weight = weight.masked_fill(label < 0, 0)
    if by_iou:
        with torch.no_grad():
            pairs = box.detach(), target
            missed = regression.iou_loss(*pairs, mode="linear", eps=MIN_QUALITY, keep=2)
            metric = 1 - missed
    # Weights are normalised, not losses: gradients are then right as they are found.
    weight = weight * factors[0] / (by + added[0])
    op, params = row_op(classes, class_constants)
    none = [None] * len(sizes)
    levels = zip(
        scores,
        labels,
        none if metric is None else metric.split(sizes, 1),
        masks or none,
        weight.split(sizes, 1),
        strict=True,
    )
    out = [op(*level, weight=w, **params) for *level, w in levels]
    op, params = row_op(boxes, box_constants)
    weight = of_boxes * (factors[1] / (box_norm.clamp(min=1) + added[1]))
    each = op(box, target, weight=weight, keep=2, **params)
    out += [level.sum() for level in each.split(sizes, 1)]
    if logits:
        weight = positive.to(dtype) * factors[2] / (by + added[2])
        logit = torch.cat(list(logits), 1).masked_fill(~positive, 0)
        entries = classification.dense(logit, of_boxes)
        each = classification.binary_cross_entropy(*entries, weight=weight, keep=2)
        out += [level.sum() for level in each.split(sizes, 1)]
    return torch.stack(out)


def _decoded(
    codes: Tensor, anchors: Tensor, positive: Tensor, decode: str, constants: Sequence[float]
) -> Tensor:
    """Boxes of positives. What background predicts is not looked at, so its gradient is 0."""
    weight = positive.to(anchors.dtype)
    if decode == "distances":
        return coding.distance_decode(codes, anchors[..., :2], weight=weight)
    if decode != "deltas":
        return codes
    return coding.delta_decode(
        codes,
        anchors,
        weight=weight,
        means=tuple(constants[:4]),
        stds=tuple(constants[4:8]),
        limit=constants[8],
        max_shift=constants[9],
    )


@dense.triton
def _(given: Any) -> Plan:
    sizes = tuple(level.shape[1] for level in given.labels)
    n_images, _, n_classes = row_shape(given.scores[0], 3)
    columns = min(power_of_2(n_classes), 16)
    # Half a tile and two warps: a whole one spills, where boxes are decoded and centred.
    rows = TILE // 2 // columns
    kinds = (DIVISOR, SUM, DIVISOR) if given.logits else (SUM, SUM)
    rows_of_sums = (0, 3, 0) if given.logits else (2, 3)
    each = zip(given.factors, kinds, rows_of_sums, given.added, strict=True)
    terms = tuple(
        (float(factor), kind, row if kind == SUM else float(addend))
        for factor, kind, row, addend in each
    )
    return Plan(
        kernels.dense.dense_kernel,
        terms=terms,
        n_sums=4,
        blocks=tuple(-(-n // rows) for n in sizes),
        n_repeats=n_images,
        n_segments=len(given.scores),
        divisor=given.divisor[0] if given.divisor else None,
        arguments={
            "sizes": sizes,
            "n_images": n_images,
            "n_classes": n_classes,
            "CLASSES": loss_of(given.classes, *given.class_constants),
            "BOXES": loss_of(given.boxes, *given.box_constants),
            "CODE": (given.decode, *map(float, given.decode_constants)),
            "CENTRED": bool(given.logits),
            "BACKGROUND": float(given.background),
            "MIN_QUALITY": MIN_QUALITY if given.by_iou else 0.0,
            "UNION_EPS": regression.UNION_EPS,
            "N_LEVELS": len(given.scores),
            "BR": rows,
            "BC": columns,
            "num_warps": 2,
        },
    )
