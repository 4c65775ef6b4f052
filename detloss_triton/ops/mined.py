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
    Sample,
    Tensors,
    fused_op,
    new_gradients,
    power_of_2,
)
from detloss_triton.precision import arithmetic_dtype

from . import coding, distribution, regression, selection
from .dense import is_object

# Added to the divisor of boxes: the spacing of float32 at 1.
_EPS = 2.0**-23
# Partial sums that a program adds at a time.
_BLOCK = 1024


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    n_images, n_classes = 3, 6
    for decode, ratio in (("", 3), ("deltas", 2), ("", 0)):
        low = uniform(n_images, rows, 2) * 40
        anchors = torch.cat([low, low + 4 + uniform(n_images, rows, 2) * 20], -1)
        labels = torch.randint(-2, n_classes + 3, (n_images, rows), generator=generator)
        labels[uniform(n_images, rows) < 0.7] = n_classes
        labels[1:2] = n_classes
        codes = torch.randn(n_images, rows, 4, generator=generator)
        sides = is_object(labels, n_classes).unsqueeze(-1) * uniform(n_images, rows, 4).round() * 2
        yield Sample(
            (
                (torch.randn(n_images, rows, n_classes + 1, generator=generator) * 3,),
                (labels,),
                (uniform(n_images, rows).round() * 2,),
                (codes,),
                (anchors,) if decode else (),
                (anchors + codes if decode else codes.flip(1),),
                (sides,),
                () if ratio else (torch.tensor(5.0),),
            ),
            {
                "number": 7.0,
                "ratio": ratio,
                "beta": 0.8,
                "decode": decode,
                "decode_constants": _DECODE if decode else (),
            },
        )


_DECODE = (0.0, 0.1, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 4.135, 0.0)


@fused_op(
    levels=("scores", "labels", "weights", "codes", "anchors", "targets", "box_weights"),
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

    Shapes, each of one tensor, or of none where () is said:
        scores (N, A, C + 1); labels (N, A) in [0, C), C of negatives, others are ignored;
        weights (N, A); codes (N, A, 4); anchors (N, A, 4) xyxy, () where codes are boxes;
        targets, box_weights (N, A, 4); divisor of one number, () for `number`.

    Args:
        beta: where smooth L1 turns linear.
        decode, decode_constants: "deltas" and what `delta_decode` takes, or "".
    """
    (score,), (label,), (weight,), (box,), (target,), (sides,) = (
        scores, labels, weights, codes, targets, box_weights
    )  # fmt: skip
    dtype = arithmetic_dtype(score, box)
    weight, n_classes = weight.to(dtype), score.shape[-1] - 1
    by = divisor[0].to(dtype) if divisor else number or 1.0
    if isinstance(by, Tensor):
        by = by.masked_fill(by == 0, 1)
    positive, negative = is_object(label, n_classes), label == n_classes
    n_taken = positive.sum(1, keepdim=True) * ratio
    # Few rows are taken: what the others cost is looked at, and not differentiated.
    hardness = (_as_background(score.detach().to(dtype)) * weight).masked_fill(weight == 0, 0)
    hardness = hardness.masked_fill(~negative, -torch.inf)
    counts = positive | (selection.hardest(hardness, n_taken) & negative)
    # Weights are divided, not losses: gradients are then right as they are found.
    taken = weight.masked_fill(~counts, 0) / by
    classes = distribution.two_bin(score, label, None, None, weight=taken, keep=1)
    if decode:
        box = coding.delta_decode(
            box,
            anchors[0],
            weight=(sides != 0).any(-1),
            means=tuple(decode_constants[:4]),
            stds=tuple(decode_constants[4:8]),
            limit=decode_constants[8],
            max_shift=decode_constants[9],
        )
    pair = box.unsqueeze(-1), target.unsqueeze(-1)
    boxes = regression.smooth_l1(*pair, weight=sides, keep=1, beta=beta) / (by + _EPS)
    return torch.cat([classes, boxes])


def _as_background(score: Tensor) -> Tensor:
    """What rows (N, A, C + 1) cost that are background, the last class."""
    highest = score.amax(-1)
    total = (score - highest.unsqueeze(-1)).exp_().sum(-1)
    return total.log() - (score[..., -1] - highest)


mined.limited(distribution.two_bin.beyond)


@dataclass
class _Passes:
    """Rows, then images; backward is rows alone, which know what images have mined."""

    divisor: float | Tensor
    ratio: int
    images: int
    anchors: int
    rows: int
    arguments: dict[str, Any]

    def n_losses(self) -> int:
        return 2 * self.images

    def n_found(self) -> int:
        return self.n_losses() + self.images * self.anchors

    @property
    def n_blocks(self) -> int:
        return -(-self.anchors // self.rows)

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
        by_tensor = isinstance(self.divisor, Tensor)
        backend.launch(
            kernels.mined.mining_kernel,
            (self.images,),
            device,
            p_hardness=hardness,
            p_sums=sums,
            p_divisor=self.divisor if by_tensor else None,
            p_out=out,
            p_found=found,
            divisor=1.0 if by_tensor else float(self.divisor),
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
        dout = dout.to(torch.float32).contiguous()
        self._launch(call, tensors, into, p_dout=dout, p_found=found)
        return into

    def _launch(
        self, call: FusedCall, tensors: Tensors, gradients: Gradients, **pointers: Tensor
    ) -> None:
        if self.images * self.anchors == 0:
            return
        none = dict.fromkeys(("p_hardness", "p_sums", "p_dout", "p_found"))
        backend.launch(
            kernels.mined.mined_kernel,
            (self.images * self.n_blocks,),
            tensors[0].device,
            levels=call.levels(tensors, gradients),
            **{**none, **pointers},
            n_rows=self.anchors,
            n_blocks=self.n_blocks,
            **self.arguments,
        )


@mined.triton
def _(
    scores: tuple[Tensor, ...],
    labels: Any,
    weights: Any,
    codes: Any,
    anchors: Any,
    targets: Any,
    box_weights: Any,
    divisor: tuple[Tensor, ...],
    number: float,
    ratio: int,
    beta: float,
    decode: str,
    decode_constants: tuple[float, ...],
) -> _Passes:
    images, n_anchors, n_features = scores[0].shape
    two_bin: Any = distribution.two_bin
    tile = two_bin.launcher(scores[0], None, None, None)
    return _Passes(
        divisor=divisor[0] if divisor else number,
        ratio=ratio,
        images=images,
        anchors=n_anchors,
        rows=tile.rows,
        arguments={
            "n_features": n_features,
            "SIDES": ("smooth_l1", float(beta)),
            "CODE": (decode, *map(float, decode_constants)),
            "BR": tile.rows,
            **tile.constants,
        },
    )
