"""Boxes from what a head regresses: the decoders a criterion needs on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.engine import TILE, Input, Sample, Tile, row_map


def _delta_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    low = torch.rand(rows, 2, generator=generator) * 50
    anchors = torch.cat([low, low + 1 + torch.rand(rows, 2, generator=generator) * 20], -1)
    deltas = torch.randn(rows, 4, generator=generator)
    deltas[: rows // 4] *= 20
    norm = {"means": (0.1, 0.0, -0.2, 0.3), "stds": (0.1, 0.2, 0.3, 0.4)}
    weight = (torch.rand(rows, generator=generator) * 2).round()
    yield Sample((deltas, anchors), norm | {"limit": 4.135, "max_shift": 0.0}, weight)
    yield Sample((deltas, anchors), norm | {"limit": 1.5, "max_shift": 8.0})


@row_map(
    Input("deltas", features=1, grad=True),
    Input("anchors", features=1),
    values=4,
    samples=_delta_samples,
    skip=True,
)
def delta_decode(
    deltas: Tensor,
    anchors: Tensor,
    means: tuple[float, ...],
    stds: tuple[float, ...],
    limit: float,
    max_shift: float,
) -> Tensor:
    """Boxes xyxy: centre + d size, and size exp(r) with r clamped to +-limit.

    Where max_shift > 0 the centre moves by at most that, and r is clamped from above only.
    """
    dx, dy, dw, dh = (
        d * std + mean for d, std, mean in zip(deltas.unbind(-1), stds, means, strict=True)
    )
    x1, y1, x2, y2 = anchors.unbind(-1)
    left, right = _decode_axis(dx, dw, x1, x2, limit, max_shift)
    top, bottom = _decode_axis(dy, dh, y1, y2, limit, max_shift)
    return torch.stack([left, top, right, bottom], -1)


def _decode_axis(
    delta: Tensor, log_ratio: Tensor, low: Tensor, high: Tensor, limit: float, max_shift: float
) -> tuple[Tensor, Tensor]:
    size = high - low
    shift = delta * size
    if max_shift > 0:
        shift = shift.clamp(-max_shift, max_shift)
        log_ratio = log_ratio.clamp(max=limit)
    else:
        log_ratio = log_ratio.clamp(-limit, limit)
    centre = (low + high) / 2 + shift
    half = size * log_ratio.exp() / 2
    return centre - half, centre + half


def delta_encode(
    anchors: Tensor, boxes: Tensor, means: Sequence[float], stds: Sequence[float]
) -> Tensor:
    """Deltas (..., 4) that turn anchors (..., 4) into boxes (..., 4), both xyxy."""
    p_centre, p_size = _centre_size(anchors)
    g_centre, g_size = _centre_size(boxes)
    shift, log_ratio = (g_centre - p_centre) / p_size, torch.log(g_size / p_size)
    # Column by column, as a tensor of the constants would be copied to the device each time.
    deltas = torch.cat([shift, log_ratio], -1).unbind(-1)
    normalised = zip(deltas, means, stds, strict=True)
    return torch.stack([(d - mean) / std for d, mean, std in normalised], -1)


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


@delta_decode.triton
def _(given: Any) -> Tile:
    return Tile(
        kernels.boxes.delta_decode_kernel,
        rows=TILE // 8,
        constants={
            "CODE": (
                "deltas",
                *map(float, (*given.means, *given.stds, given.limit, given.max_shift)),
            )
        },
    )


def _distance_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    distances = torch.randn(rows, 4, generator=generator)
    points = torch.rand(rows, 2, generator=generator) * 50
    yield Sample((distances, points))
    yield Sample((distances, points), {}, (torch.rand(rows, generator=generator) * 2).round())


@row_map(
    Input("distances", features=1, grad=True),
    Input("points", features=1),
    values=4,
    samples=_distance_samples,
    skip=True,
)
def distance_decode(distances: Tensor, points: Tensor) -> Tensor:
    """Boxes xyxy: the point less (left, top), plus (right, bottom)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


@distance_decode.triton
def _(given: Any) -> Tile:
    return Tile(kernels.boxes.distance_decode_kernel, rows=TILE // 4)
