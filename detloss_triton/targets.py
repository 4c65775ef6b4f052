"""Ragged targets of a batch as padded tensors, packed once per step.

Padding is bucketed: the box dimension takes few sizes, so that neither Inductor nor Triton compiles
anew because a batch holds another number of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import check_shapes

SMALLEST_BUCKET = 8


class Targets(NamedTuple):
    """Boxes of B images, padded to T a piece.

    Shapes:
        labels: (B, T) int64, -1 beyond an image's count.
        boxes: (B, T, 4) normalised cxcywh, 0 beyond.
        counts: (B,) int64, on the boxes' device.
    """

    labels: Tensor
    boxes: Tensor
    counts: Tensor


def bucket(n: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: at most a third of a tensor is padding."""
    size = SMALLEST_BUCKET
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def pack(targets: Targets | Sequence[Mapping[str, Tensor]]) -> Targets:
    """Pad a list of {"labels": (n,), "boxes": (n, 4) normalised cxcywh}; `Targets` pass through.

    The counts are shapes, so nothing is read from the device; what goes there is one small index.

    Raises:
        TypeError, ValueError: for a missing key or a wrong shape; they name the image.
    """
    if isinstance(targets, Targets):
        check_shapes(
            "Targets",
            labels=(targets.labels, ("B", "T")),
            boxes=(targets.boxes, ("B", "T", 4)),
            counts=(targets.counts, ("B",)),
        )
        return targets
    if not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of dictionaries or Targets, got {type(targets)}")
    images: list[Any] = list(targets)
    if not images:
        raise ValueError("targets must hold one dictionary per image, got an empty list")
    for i, target in enumerate(images):
        _check(i, target)
    counts = [len(target["labels"]) for target in images]
    device = images[0]["boxes"].device
    index = padded_index(counts, bucket(max(counts)), device)
    labels = joined([target["labels"].to(torch.int64) for target in images], index, -1)
    boxes = joined([target["boxes"] for target in images], index, 0)
    return Targets(labels, boxes, (index > 0).sum(1))


def _check(i: int, target: Any) -> None:
    if not isinstance(target, Mapping):
        raise TypeError(f"targets[{i}] must be a dictionary, got {type(target)}")
    labels: Any = target.get("labels")
    boxes: Any = target.get("boxes")
    for key, value in (("labels", labels), ("boxes", boxes)):
        if not isinstance(value, Tensor):
            raise ValueError(f"targets[{i}] must have a tensor {key!r}, got {value!r}")
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"targets[{i}]['labels'] must be integers of shape (n,), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if boxes.shape != (len(labels), 4):
        raise ValueError(
            f"targets[{i}]['boxes'] must have shape ({len(labels)}, 4) as there are "
            f"{len(labels)} labels, got {tuple(boxes.shape)}"
        )


def padded_index(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(B, width) positions of ragged rows in their concatenation behind a filler; 0 is padding."""
    index = torch.zeros(len(counts), width, dtype=torch.int64)
    start = 1
    for row, count in zip(index, counts, strict=True):
        row[:count] = torch.arange(start, start + count)
        start += count
    return index.to(device, non_blocking=True)


def joined(parts: Sequence[Tensor], index: Tensor, fill: float) -> Tensor:
    """The concatenation of `parts` behind a row of `fill`, at `index`."""
    filler = parts[0].new_full((1, *parts[0].shape[1:]), fill)
    return torch.cat([filler, *parts])[index]
