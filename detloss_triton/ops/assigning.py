"""What the assigners share: which targets are real, and what an anchor that got one is told."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detloss_triton.boxes import Columns, area, columns, overlap

# The union of two boxes is at least this.
IOU_EPS = 1e-6

# Pairs of anchors and targets that a reference holds at a time.
_PAIRS = 2**22

# Of each anchor: the index of its target, or -1; the label of that, or -1; their IoU, or 0; and the
# target's box, or zeros.
Assigned = tuple[Tensor, Tensor, Tensor, Tensor]


def parts(n_targets: int, n_anchors: int) -> Iterator[slice]:
    """Slices of the targets, such that not too many pairs with anchors are held at a time."""
    step = max(_PAIRS // max(n_anchors, 1), 1)
    for start in range(0, n_targets, step):
        yield slice(start, start + step)


def real(labels: Tensor, counts: Tensor) -> Tensor:
    """(B, T) which rows are targets: those within an image's count, of no negative label."""
    row = torch.arange(labels.shape[1], device=labels.device)
    return (row < counts.unsqueeze(1)) & (labels >= 0)


def iou(p: Columns, t: Columns) -> Tensor:
    """IoU of broadcastable columns; of boxes that hold NaN 0."""
    inter = overlap(p, t)
    union = (area(p) + area(t)).sub_(inter).clamp_(min=IOU_EPS)
    return inter.div_(union).nan_to_num_(nan=0)


def told(target: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Assigned:
    """What each of the boxes (B, A, 4) or (A, 4), predictions or anchors, is told of its target."""
    none = target < 0
    index = target.clamp(min=0)
    label = labels.gather(1, index).to(torch.int64).masked_fill(none, -1)
    box = targets.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
    metric = iou(columns(boxes), columns(box)).masked_fill(none, 0)
    return target, label, metric, box.masked_fill(none.unsqueeze(2), 0)


def told_to_few(target: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Assigned:
    """As `told`, on a CPU, which sees who got a target: a tenth of the time, as few do."""
    _, label, metric, box = nothing(target.shape[1], targets)
    image, anchor = (target >= 0).nonzero(as_tuple=True)
    which = target[image, anchor]
    of_target, of_anchor = targets[image, which], boxes.expand(*target.shape, 4)[image, anchor]
    label[image, anchor] = labels[image, which].to(torch.int64)
    metric[image, anchor] = iou(columns(of_anchor), columns(of_target))
    box[image, anchor] = of_target
    return target, label, metric, box


def nothing(n_anchors: int, targets: Tensor) -> Assigned:
    """What anchors of B images are told without a target."""
    none = targets.new_full((len(targets), n_anchors), -1, dtype=torch.int64)
    box = targets.new_zeros((*none.shape, 4))
    return none, none.clone(), box[..., 0].clone(), box


def unwritten(n_anchors: int, targets: Tensor) -> Assigned:
    """Memory for what a kernel tells the anchors."""
    target = targets.new_empty((len(targets), n_anchors), dtype=torch.int64)
    box = targets.new_empty((*target.shape, 4), dtype=torch.float32)
    return target, torch.empty_like(target), box.new_empty(target.shape), box
