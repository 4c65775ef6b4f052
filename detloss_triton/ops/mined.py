"""SSD's losses of each image: classes with hard negative mining, and boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.engine import (
    FusedCall,
    Gradients,
    Passes,
    Sample,
    Tensors,
    fused_op,
    new_gradients,
    power_of_2,
    strided,
    upstream,
)
from detloss_triton.precision import arithmetic_dtype, at_least_float32

from . import coding, distribution, regression, selection
from .dense import is_object

# Added to the divisor of boxes: the spacing of float32 at 1.
_EPS = 2.0**-23
# Exponentials relative to a label's that sum to so much are taken relative to the largest.
_FAR = 1e30
# Partial sums that a program adds at a time.
_BLOCK = 1024


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    n_images, n_classes = 3, 6
    # As a criterion has them, and as a head's maps: two shapes of anchors, one, and no position.
    n = rows // 3
    for decode, ratio, sizes in (
        ("", 3, [(1, rows)]),
        ("deltas", 2, [(2, n), (1, rows - 2 * n), (2, 0)]),
        ("", 0, [(1, rows)]),
        ("targets", 1, [(1, 2 * n), (1, rows - 2 * n)]),
    ):
        low = uniform(n_images, rows, 2) * 40
        anchors = torch.cat([low, low + 4 + uniform(n_images, rows, 2) * 20], -1)
        labels = torch.randint(-2, n_classes + 3, (n_images, rows), generator=generator)
        labels[uniform(n_images, rows) < 0.7] = n_classes
        labels[1:2] = n_classes
        codes = torch.randn(n_images, rows, 4, generator=generator)
        scores = torch.randn(n_images, rows, n_classes + 1, generator=generator) * 3
        sides = is_object(labels, n_classes).unsqueeze(-1) * uniform(n_images, rows, 4).round() * 2
        targets = anchors + codes if decode else codes.flip(1)
        if decode == "targets":
            targets[:, ::3, 2:] = targets[:, ::3, :2]
        of_scores, of_codes = by_level(scores, sizes), by_level(codes, sizes)
        if decode:
            of_scores, of_codes = map(_as_in_maps, (of_scores, of_codes))
        yield Sample(
            (
                of_scores,
                (labels,),
                (uniform(n_images, rows).round() * 2,),
                of_codes,
                (anchors,) if decode else (),
                (targets,),
                (sides,) if decode != "targets" else (),
                () if ratio else (torch.tensor(5.0),),
            ),
            {
                "number": 7.0,
                "ratio": ratio,
                "beta": 0.8,
                "decode": decode,
                "decode_constants": {"deltas": _DECODE, "targets": _DECODE[:8]}.get(decode, ()),
            },
        )


def _as_in_maps(levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(level.mT.contiguous().mT for level in levels)


def by_level(rows: Tensor, sizes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Rows (N, A, ...) as those of each level, (N, k, n, ...), of sizes (k, n)."""
    levels = rows.split([k * n for k, n in sizes], 1)
    return tuple(x.unflatten(1, tuple(size)) for x, size in zip(levels, sizes, strict=True))


_DECODE = (0.0, 0.1, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 4.135, 0.0)


@fused_op(
    levels=("scores", "codes"),
    gradients=("scores", "codes"),
    samples=_samples,
)
def mined(
    scores: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    codes: tuple[Tensor, ...],
    anchors: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    box_weights: tuple[Tensor, ...],
    divisor: tuple[Tensor, ...],
    number: float,
    ratio: int,
    beta: float,
    decode: str,
    decode_constants: tuple[float, ...],
) -> Tensor:
    """Losses (2 N,) of N images: their classes', then their boxes'.

    Classes: weighted softmax cross-entropy, summed over the positives and `ratio` times as many
    negatives, the hardest: those that cost most, of equal ones the first. Boxes: smooth L1 of each
    side. Both are divided by the divisor, 1 in the place of 0.

    Shapes, where the A anchors are those of all levels: of a level one after the other the n of
    each of its k shapes of anchors:
        scores, codes: of each level (N, k, n, C + 1) and (N, k, n, 4).
        labels (N, A) in [0, C), C of negatives, others are ignored; weights (N, A);
        anchors (N, A, 4) xyxy, () if not asked for; targets, box_weights (N, A, 4);
        divisor of one number, () for `number`; each of these of one tensor.

    Args:
        beta: where smooth L1 turns linear.
        decode, decode_constants: "deltas" and what `delta_decode` takes, for codes that are to be
            decoded; "targets" and what `delta_encode` takes, for targets that are boxes and are to
            be encoded, in which case box_weights is (), and a target of no size counts for nothing;
            or "".
    """
    (label,), (weight,), (target,) = labels, weights, targets
    dtype = arithmetic_dtype(*scores, *codes)
    by = _divisor(divisor, number, dtype)
    n_classes = scores[0].shape[-1] - 1
    sizes = [level.shape[1:3] for level in scores]
    of_levels = by_level(label, sizes)
    # Few rows are taken: what the others cost is looked at, and not differentiated.
    costs = [
        distribution.two_bin(x.detach(), of, None, None, keep=3).flatten(1)
        for x, of in zip(scores, of_levels, strict=True)
    ]
    taken = _taken(torch.cat(costs, 1), label, weight.to(dtype), n_classes, ratio) / by
    levels = zip(scores, of_levels, by_level(taken, sizes), strict=True)
    # One by one, as a gradient that is found with a sum would be found for all rows in a graph.
    each = [distribution.two_bin(x, of, None, None, weight=w, keep=3) for x, of, w in levels]
    classes = torch.cat([level.flatten(1) for level in each], 1).sum(1)
    box = torch.cat([level.flatten(1, 2) for level in codes], 1)
    if decode == "targets":
        has_size = _has_size(target)
        # An anchor stands in for its target of no size, whose logarithm takes 30 times as long.
        target = target.where(has_size.unsqueeze(-1), anchors[0].to(target.dtype))
        pair = at_least_float32(anchors[0]), at_least_float32(target)
        target = coding.delta_encode(*pair, decode_constants[:4], decode_constants[4:])
        of_boxes = regression.smooth_l1(box, target, weight=has_size.to(dtype), keep=1, beta=beta)
    else:
        (sides,) = box_weights
        if decode:
            box = _decoded(box, anchors[0], sides, decode_constants)
        pair = box.unsqueeze(-1), target.unsqueeze(-1)
        of_boxes = regression.smooth_l1(*pair, weight=sides, keep=1, beta=beta)
    return torch.cat([classes, of_boxes / (by + _EPS)])


def _divisor(divisor: tuple[Tensor, ...], number: float, dtype: torch.dtype) -> float | Tensor:
    if not divisor:
        return number or 1.0
    by = divisor[0].to(dtype)
    return by.masked_fill(by == 0, 1)


def _taken(cost: Tensor, label: Tensor, weight: Tensor, n_classes: int, ratio: int) -> Tensor:
    """Weights (N, A) of positives and of the hardest negatives, by what all cost as background."""
    positive, negative = is_object(label, n_classes), label == n_classes
    hardness = (cost * weight).masked_fill(weight == 0, 0).masked_fill(~negative, -torch.inf)
    n_taken = positive.sum(1, keepdim=True) * ratio
    counts = positive | (selection.hardest(hardness, n_taken) & negative)
    return weight.masked_fill(~counts, 0)


def _has_size(box: Tensor) -> Tensor:
    x1, y1, x2, y2 = box.unbind(-1)
    return (x2 > x1) & (y2 > y1)


def _decoded(codes: Tensor, anchors: Tensor, sides: Tensor, constants: Sequence[float]) -> Tensor:
    boxes: Tensor = coding.delta_decode(
        codes,
        anchors,
        weight=(sides != 0).any(-1),
        means=tuple(constants[:4]),
        stds=tuple(constants[4:8]),
        limit=constants[8],
        max_shift=constants[9],
    )
    return boxes


mined.limited(distribution.two_bin.beyond)


@dataclass
class _Passes(Passes):
    """Rows, then images; backward is rows alone, which know what images have mined."""

    divisor: Any
    ratio: int
    images: int
    anchors: int
    n_blocks: int
    arguments: dict[str, Any]

    def n_losses(self) -> int:
        return 2 * self.images

    def n_found(self) -> int:
        return self.n_losses() + self.images * self.anchors

    def forward(self, call: FusedCall, tensors: Tensors) -> tuple[Tensor, Tensor]:
        device = tensors[0].device
        sizes = (
            (self.n_losses(),),
            (self.n_found(),),
            (self.images, self.anchors),
            (3, self.images * self.n_blocks),
        )
        out, found, hardness, sums = (
            torch.empty(size, dtype=torch.float32, device=device) for size in sizes
        )
        if not self.images:
            return out, found
        none: Gradients = [None] * len(tensors)
        self._launch(call, tensors, none, p_hardness=hardness, p_sums=sums)
        divisor, number = self.divided(call, tensors)
        backend.launch(
            kernels.mined.mining_kernel,
            (self.images,),
            device,
            p_hardness=hardness,
            p_sums=sums,
            p_divisor=divisor,
            p_out=out,
            p_found=found,
            divisor=number,
            ratio=min(self.ratio, self.anchors),
            n_rows=self.anchors,
            n_blocks=self.n_blocks,
            EPS=_EPS,
            BLOCK=min(power_of_2(self.n_blocks), _BLOCK),
            **selection.block(self.anchors),
        )
        return out, found

    def backward(
        self,
        call: FusedCall,
        tensors: Tensors,
        dout: Tensor,
        wanted: Sequence[bool],
        found: Tensor,
    ) -> Gradients:
        into = new_gradients(tensors, wanted)
        self._launch(call, tensors, into, dout=upstream(dout), p_found=found)
        return into

    def _launch(
        self, call: FusedCall, tensors: Tensors, gradients: Gradients, **pointers: Any
    ) -> None:
        if self.images * self.anchors == 0:
            return
        none = dict.fromkeys(("p_hardness", "p_sums", "dout", "p_found"))
        backend.launch(
            kernels.mined.mined_kernel,
            (self.images * self.n_blocks,),
            tensors[0].device,
            levels=call.signature.levels(tensors, gradients),
            **{**none, **pointers},
            n_anchors=self.anchors,
            n_blocks=self.n_blocks,
            **self.filled(tensors),
        )


@mined.triton
def _(given: Any) -> _Passes:
    images, n_anchors = given.labels[0].shape
    two_bin: Any = distribution.two_bin
    tile = two_bin.launcher(two_bin.given(given.scores[0]))
    sizes = [tuple(level.shape[1:3]) for level in given.scores]
    of_rows = (given.labels, given.weights, given.anchors, given.targets, given.box_weights)
    return _Passes(
        divisor=given.divisor[0] if given.divisor else None,
        ratio=given.ratio,
        images=images,
        anchors=n_anchors,
        n_blocks=sum(k * -(-n // tile.rows) for k, n in sizes),
        arguments={
            "rows": tuple(strided(x[0]) if x else None for x in of_rows),
            "sizes": tuple(n for _, n in sizes),
            "SHAPES": tuple(k for k, _ in sizes),
            "n_features": given.scores[0].shape[-1],
            "SIDES": ("smooth_l1", float(given.beta)),
            "CODE": (given.decode, *map(float, given.decode_constants)),
            "N_LEVELS": len(sizes),
            "BR": tile.rows,
            **tile.constants,
        },
    )
