"""Box arithmetic on coordinate columns, which broadcast: pairs one by one, or all against all."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32

# x1, y1, x2, y2, any shapes that broadcast.
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def columns(boxes: Tensor) -> Columns:
    """The four coordinates of (..., 4) boxes."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return x1, y1, x2, y2


def overlap(a: Columns, b: Columns) -> Tensor:
    """Area of the intersection."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    return width * height


def area(box: Columns) -> Tensor:
    return (box[2] - box[0]) * (box[3] - box[1])


def hull(a: Columns, b: Columns) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest enclosing box."""
    width = torch.maximum(a[2], b[2]) - torch.minimum(a[0], b[0])
    height = torch.maximum(a[3], b[3]) - torch.minimum(a[1], b[1])
    return width, height


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to corners, in float32 at least: in half, small boxes vanish."""
    boxes = at_least_float32(boxes)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def ltrb(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (..., 4) from points (..., 2) to the left, top, right and bottom of xyxy boxes.

    In float32 at least: unsigned integers would wrap.
    """
    points, boxes = at_least_float32(points), at_least_float32(boxes)
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
