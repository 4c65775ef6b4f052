"""From scores and boxes at every anchor to a short list of detections."""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import Detections

# COCO's average precision counts 100 detections per image and needs the unsure ones too.
MOST_DETECTIONS = 100
CANDIDATES = 300
LOWEST_SCORE = 0.001
SAME_OBJECT_IOU = 0.6


def detections(scores: Tensor, boxes: Tensor, image_size: int) -> list[Detections]:
    """Keep the best non-overlapping boxes of each class.

    Shapes: scores (B, A, C) in [0, 1]; boxes (B, A, 4) xyxy in pixels.
    """
    boxes = boxes.clamp(0, image_size).float().cpu()
    scores = scores.float().cpu()
    return [_detect(s, b) for s, b in zip(scores, boxes, strict=True)]


def _detect(scores: Tensor, boxes: Tensor) -> Detections:
    best, flat = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    flat, best = flat[best > LOWEST_SCORE], best[best > LOWEST_SCORE]
    labels, boxes = flat % scores.shape[1], boxes[flat // scores.shape[1]]
    keep = _suppress(boxes, labels)[:MOST_DETECTIONS]
    return Detections(boxes[keep].numpy(), best[keep].numpy(), labels[keep].numpy())


def _suppress(boxes: Tensor, labels: Tensor) -> Tensor:
    """Indices of the boxes that no better box of the same class overlaps; boxes come best first."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    iou = inter / (area[:, None] + area[None] - inter).clamp(min=1e-6)
    rivals = ((iou > SAME_OBJECT_IOU) & (labels[:, None] == labels[None])).numpy()
    keep = torch.ones(len(boxes), dtype=torch.bool).numpy()
    for i in range(len(boxes)):
        if keep[i]:
            keep[i + 1 :] &= ~rivals[i, i + 1 :]
    return torch.from_numpy(keep).nonzero()[:, 0]
