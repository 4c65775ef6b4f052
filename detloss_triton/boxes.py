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


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of anchor centres in boxes (FCOS; Tian et
    al., 2019): (...,) in [0, 1] of (..., 4) xyxy; 0 for a centre outside its box.
    """
    x1, y1, x2, y2 = columns(anchors)
    left, top, right, bottom = columns(boxes)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, right, top, bottom = x - left, right - x, y - top, bottom - y
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).clamp(min=0).sqrt()


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


def from_ltrb(distances: Tensor, points: Tensor, stride: Tensor) -> Tensor:
    """Boxes (N, 4, A) xyxy from distances (N, 4, A), in strides (A,), of points (A, 2)."""
    # In half precision, coordinates around 640 are 0.5 pixels apart.
    distances = at_least_float32(distances) * stride
    points = points.T
    return torch.cat([points - distances[:, :2], points + distances[:, 2:]], 1)
