"""YOLOX's losses: objectness of all anchors, classes and boxes of the positives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.engine import (
    DIVISOR,
    TILE,
    FusedCall,
    Gradients,
    Plan,
    Sample,
    Tensors,
    fused_op,
    power_of_2,
    rows_at,
)
from detloss_triton.precision import arithmetic_dtype

from . import classification, regression
from .dense import loss_of, row_op
from .selection import first_set

# Counts that a program adds at a time.
_BLOCK = 1024


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def boxes(*shape: int) -> Tensor:
        low = uniform(*shape, 2) * 40
        return torch.cat([low, low + 4 + uniform(*shape, 2) * 20], -1)

    n_images, n_classes = 2, 6
    for box, constants, with_raw, missing in (
        ("iou_loss square", (1e-16,), True, 0),
        ("giou_loss", (1e-6,), False, 2),
        ("l1", (), True, -2),
    ):
        mask = uniform(n_images * rows) < 0.3
        n = max(int(mask.sum()) + missing, 0)
        of_boxes = boxes(n)
        pred = boxes(n_images, rows)
        at = mask.nonzero()[:n, 0]
        pred.view(-1, 4)[at] = of_boxes[: len(at)] + uniform(len(at), 4) * 4
        soft = (uniform(n_images * rows, 1) * 1.4 - 0.2, uniform(n, n_classes) * 1.2 - 0.2)
        yield Sample(
            (
                (torch.randn(n_images, rows, generator=generator) * 3,),
                (torch.randn(n_images, rows, n_classes, generator=generator) * 3,),
                (pred,),
                (torch.randn(n_images, rows, 4, generator=generator),) if with_raw else (),
                (soft[0],),
                (soft[1],),
                (of_boxes,),
                (torch.randn(n, 4, generator=generator),) if with_raw else (),
                (mask,),
                (torch.tensor(5.0),) if with_raw else (),
            ),
            {
                "number": 7.0,
                "box": box,
                "box_constants": constants,
                "factors": (1.5, 5.0, 0.5, 2.0) if with_raw else (1.0, 2.0, 1.0),
            },
        )


@fused_op(
    levels=("objectness", "classes", "boxes", "raw"),
    gradients=("objectness", "classes", "boxes", "raw"),
    samples=_samples,
)
def positives(
    objectness: tuple[Tensor, ...],
    classes: tuple[Tensor, ...],
    boxes: tuple[Tensor, ...],
    raw: tuple[Tensor, ...],
    of_objects: tuple[Tensor, ...],
    of_classes: tuple[Tensor, ...],
    of_boxes: tuple[Tensor, ...],
    of_raw: tuple[Tensor, ...],
    mask: tuple[Tensor, ...],
    divisor: tuple[Tensor, ...],
    number: float,
    box: str,
    box_constants: tuple[float, ...],
    factors: tuple[float, ...],
) -> Tensor:
    """Losses (3,) or with raw boxes (4,): classes, boxes, objectness, L1 of raw boxes.

    Classes and objectness are binary cross-entropies, negative targets weigh 0. Each is summed,
    multiplied by its factor, divided by the divisor. The k-th anchor that is set has the k-th
    target; anchors without a target, and targets without an anchor, add nothing.

    Shapes, each of one tensor, or of none where () is said:
        objectness (N, A) logits; classes (N, A, C) logits; boxes (N, A, 4); raw (N, A, 4), or ();
        of_objects (N * A, 1); of_classes (P, C); of_boxes (P, 4); of_raw (P, 4), or ();
        mask (N * A,); divisor of one number, () for `number`.

    Args:
        box, box_constants: name of the op of boxes, and its constants.
    """
    dtype = arithmetic_dtype(*objectness, *classes, *boxes, *raw)
    index = first_set(mask[0], n=len(of_boxes[0]))
    weight = (index < len(mask[0])).to(dtype)

    def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        kept = (target >= 0).to(dtype)
        if weight is not None:
            kept = kept * weight.unsqueeze(-1)
        entries = classification.dense(logits, target)
        loss: Tensor = classification.binary_cross_entropy(*entries, weight=kept)
        return loss

    op, params = row_op(box, box_constants)
    out = [
        cross_entropy(rows_at(classes[0], index), of_classes[0], weight),
        op(rows_at(boxes[0], index), of_boxes[0], weight=weight, **params),
        cross_entropy(objectness[0].reshape(-1, 1), of_objects[0], None),
    ]
    if raw:
        out.append(regression.l1(rows_at(raw[0], index), of_raw[0], weight=weight))
    by = divisor[0].to(dtype) if divisor else number
    return torch.stack([x * factor for x, factor in zip(out, factors, strict=True)]) / by


class _Counting(Plan):
    """Positives are counted first; backward is told the counts, behind the factors."""

    def n_found(self) -> int:
        return self.n_losses() + self.n_programs

    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        sizes = ((self.n_found(),), (self.n_sums, self.n_programs))
        found, sums = (
            torch.empty(size, dtype=torch.float32, device=tensors[0].device) for size in sizes
        )
        if self.n_programs:
            counts, arguments = found[self.n_losses() :], self.filled(tensors)
            backend.launch(
                kernels.positives.count_kernel,
                (self.n_programs,),
                found.device,
                p_counts=counts,
                num_warps=1,
                **{name: arguments[name] for name in ("mask", "n_rows", "n_blocks", "BR")},
            )
            none: Gradients = [None] * len(tensors)
            self._launch(call, tensors, none, p_out=sums, p_counts=counts)
        return self._totals(call, tensors, sums, scale=found)

    def _known(self, found: Tensor) -> dict[str, Tensor]:
        return {"p_scale": found, "p_counts": found[self.n_losses() :]}


@positives.triton
def _(given: Any) -> Plan:
    n_images, n_anchors, n_classes = given.classes[0].shape
    columns = min(power_of_2(n_classes), 16)
    rows = TILE // columns
    n_blocks = -(-n_anchors // rows)
    # As all tensors with features, but for the one dimension of rows.
    of_rows = given.of_objects, given.of_classes, given.of_boxes, given.of_raw
    targets = tuple((x[0], 0, *x[0].stride()) if x else None for x in of_rows)
    return _Counting(
        kernels.positives.positives_kernel,
        terms=tuple((float(factor), DIVISOR, 0.0) for factor in given.factors),
        n_sums=len(given.factors),
        blocks=(n_blocks,),
        n_repeats=n_images,
        n_segments=1,
        divisor=given.divisor[0] if given.divisor else None,
        arguments={
            "mask": (given.mask[0], given.mask[0].stride(0)),
            "targets": targets,
            "n_rows": n_anchors,
            "n_blocks": n_blocks,
            "n_targets": len(given.of_boxes[0]),
            "n_classes": n_classes,
            "BOXES": loss_of(given.box, *given.box_constants),
            "RAW": ("l1",),
            "BLOCK": min(power_of_2(n_blocks * n_images), _BLOCK),
            "BR": rows,
            "BC": columns,
        },
    )
