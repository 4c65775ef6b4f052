"""Box arithmetic on corners, which broadcast: pairs one by one, or all against all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Corners(NamedTuple):
    """Boxes by their corners, (2, ...) each: x, then y. Both at once are half the operations."""

    low: Tensor
    high: Tensor


def coordinates_first(boxes: Tensor) -> Tensor:
    """(4, ...) of (..., 4) boxes, each coordinate in memory of its own where that pays.

    Dozens of operations follow on each: eager, one copy up front makes them contiguous.
    """
    boxes = boxes.movedim(-1, 0)
    return boxes if torch.compiler.is_compiling() else boxes.contiguous()


def corners(boxes: Tensor) -> Corners:
    """Those of (..., 4) boxes xyxy."""
    return Corners(*coordinates_first(boxes).split(2))


def area_of(size: Tensor) -> Tensor:
    """Width times height of (2, ...) sizes."""
    width, height = size.unbind()
    return width * height


def area(box: Corners) -> Tensor:
    return area_of(box.high - box.low)


def overlap(a: Corners, b: Corners) -> Tensor:
    """Area of the intersection."""
    size = torch.minimum(a.high, b.high) - torch.maximum(a.low, b.low)
    return area_of(size.clamp(min=0))


def hull(a: Corners, b: Corners) -> Tensor:
    """(2, ...) size of the smallest enclosing box."""
    return torch.maximum(a.high, b.high) - torch.minimum(a.low, b.low)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to corners, in float32 at least: in half, small boxes vanish."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def ltrb(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (..., 4) from points (..., 2) to the left, top, right and bottom of xyxy boxes."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
