"""Ragged targets of a batch as padded tensors, packed once per step.

Padding is bucketed: the box dimension takes few sizes, so that neither Inductor nor Triton compiles
anew because a batch holds another number of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .boxes import columns
from .engine import power_of_2
from .once import once
from .ops.packing import pad
from .precision import arithmetic_dtype, as_type, at_least_float32
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


def room(n: int) -> int:
    """The next of 8, 16, 32, ...: fewer sizes, each of which has a graph of its own."""
    return power_of_2(max(n, SMALLEST_BUCKET))


def with_room(targets: Targets) -> Targets:
    """The same boxes, padded to a number of rows that has a graph of its own, see `room`."""
    n = targets.labels.shape[1]
    more = max(room(n) - n, 0)
    if not more:
        return targets
    labels = torch.nn.functional.pad(targets.labels, (0, more), value=-1)
    boxes = torch.nn.functional.pad(targets.boxes, (0, 0, 0, more))
    return Targets(labels, boxes, targets.counts)


def pack(
    targets: Targets | Sequence[Mapping[str, Tensor]],
    place: str = "pack",
    like: Tensor | None = None,
) -> Targets:
    """Pad a list of {"labels": (n,), "boxes": (n, 4) normalised cxcywh}; `Targets` pass through.

    The counts are shapes, so nothing is read from the device; they alone are copied to it.
    An image without boxes may say so in tensors of any dtype, shape and device that hold nothing.

    Args:
        place: what an error begins with.
        like: predictions, where the boxes must be, and in whose arithmetic they come back; by
            default they are to be where the first is, and keep their precision.

    Raises:
        TypeError, ValueError: for a missing key, a wrong shape, dtype or device; they name the
            image.
    """
    if isinstance(targets, Targets):
        _check_packed(f"{place}, Targets", targets, like)
        if not targets.labels.shape[1]:  # there is room for a box at least
            targets = with_room(targets)
        boxes = _floating(targets.boxes, like)
        if boxes.dtype == targets.boxes.dtype:
            return targets
        return Targets(targets.labels, boxes, targets.counts)
    if not isinstance(targets, Sequence):
        raise TypeError(
            f"{place}: targets must be a list of dictionaries or Targets, "
            f"got {type(targets).__name__}"
        )
    images: list[Any] = list(targets)
    if not images:
        raise ValueError(f"{place}: targets must hold one dictionary per image, got an empty list")
    of_images = [_labels_and_boxes(f"{place}: targets[{i}]", x) for i, x in enumerate(images)]
    device = None if like is None else like.device
    counts, device = _counts_and_device(place, of_images, device)
    filled = [image for image, count in zip(of_images, counts, strict=True) if count]
    labels = [as_type(of_image, torch.int64) for of_image, _ in filled]
    boxes_of = [_floating(of_image, like) for _, of_image in filled]
    if not filled:
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
        boxes_of = [torch.empty(0, 4, dtype=torch.float32, device=device)]
    on_device = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    # To move float64, which no kernel computes with, is no reason to refuse it.
    packing = pad.reference if boxes_of[0].dtype == torch.float64 else pad
    all_labels, all_boxes = packing(
        on_device, tuple(labels), tuple(boxes_of), n_targets=bucket(max(counts))
    )
    return Targets(all_labels, all_boxes, on_device)


def _check_packed(place: str, targets: Targets, like: Tensor | None) -> None:
    labels, boxes, counts = targets
    check_shapes(
        place, labels=(labels, ("B", "T")), boxes=(boxes, ("B", "T", 4)), counts=(counts, ("B",))
    )
    if labels.is_floating_point():
        raise ValueError(f"{place}: labels must be integers, got {labels.dtype}")
    if like is not None and labels.device != like.device:
        raise ValueError(f"{place}: labels must be on {like.device}, got {labels.device}")


def pad_targets(targets: Targets | Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(B, T, 5) rows [class, box], as `YOLOv9Criterion` takes them: of class -1 beyond an image's
    boxes, and at least one such row or box, with which a batch without any box teaches too.

    Shapes:
        targets: per image {"boxes": (n, 4), "labels": (n,)}, or `Targets`; boxes of any format.

    Raises:
        TypeError, ValueError: as `pack`.
    """
    labels, boxes, counts = pack(targets, "pad_targets")
    is_box = torch.arange(labels.shape[1], device=labels.device) < counts.unsqueeze(1)
    labels = labels.masked_fill(~is_box, -1)
    return torch.cat([labels.unsqueeze(2).to(boxes.dtype), boxes], 2)


def normalised_targets(
    targets: Sequence[Mapping[str, Tensor]], image_size: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """Torchvision's targets, boxes xyxy in pixels, as `DetrCriterion` and `DFINECriterion` take
    them: boxes cxcywh, as parts of the images (height, width). Other entries are left out.

    Raises:
        TypeError, ValueError: as `pack`.
    """
    height, width = image_size
    for i, target in enumerate(targets):
        place = f"normalised_targets: targets[{i}]"
        _check(place, *_labels_and_boxes(place, target))
    out = []
    for target in targets:
        x1, y1, x2, y2 = columns(at_least_float32(target["boxes"].reshape(-1, 4)))
        x, w, y, h = (x1 + x2) / 2 / width, (x2 - x1) / width, (y1 + y2) / 2 / height, y2 - y1
        boxes = torch.stack([x, y, w, h / height], -1)
        out.append({"labels": target["labels"], "boxes": boxes})
    return out


def check_images(place: str, targets: Targets, n_images: int) -> None:
    """Raise ValueError unless the targets are of so many images."""
    if len(targets.labels) != n_images:
        raise ValueError(
            f"{place}: targets has {len(targets.labels)} images, the predictions have {n_images}"
        )


def unpack(targets: Targets) -> list[dict[str, Tensor]]:
    """One dictionary per image, as `pack` takes them; the counts are read from the device."""
    images = zip(targets.labels, targets.boxes, targets.counts.tolist(), strict=True)
    return [{"labels": labels[:n], "boxes": boxes[:n]} for labels, boxes, n in images]


def counts_of(targets: Targets | Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Boxes in each image; of `Targets` they are read from the device."""
    if isinstance(targets, Targets):
        counts: list[int] = targets.counts.tolist()
        return counts
    return [target["labels"].numel() for target in targets]


def _labels_and_boxes(place: str, target: Any) -> tuple[Any, Any]:
    """What is read of an image's targets."""
    if not isinstance(target, Mapping):
        raise TypeError(f"{place} must be a dictionary, got {type(target).__name__}")
    labels, boxes = target.get("labels"), target.get("boxes")
    if labels is None or boxes is None:
        key = "labels" if labels is None else "boxes"
        raise ValueError(f"{place} must have a tensor {key!r}, got {list(target)}")
    return labels, boxes


@once()
def _counts_and_device(
    place: str, images: Sequence[tuple[Any, Any]], device: torch.device | None
) -> tuple[tuple[int, ...], torch.device]:
    """How many boxes each image has, given (labels, boxes), and where; by default the first."""
    for i, image in enumerate(images):
        _check(f"{place}: targets[{i}]", *image)
    counts = tuple(labels.numel() for labels, _ in images)
    if device is None:
        first = next((i for i, count in enumerate(counts) if count), 0)
        device = images[first][1].device
    for i, (image, count) in enumerate(zip(images, counts, strict=True)):
        for key, x in zip(("labels", "boxes"), image, strict=True):
            if count and x.device != device:
                raise ValueError(
                    f"{place}: targets[{i}][{key!r}] must be on {device}, got {x.device}"
                )
    return counts, device


def _check(place: str, labels: Any, boxes: Any) -> None:
    """Raise unless an image's labels and boxes are tensors that fit each other."""
    for key, x in (("labels", labels), ("boxes", boxes)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{place}[{key!r}] must be a tensor, got {type(x).__name__}")
    n = labels.numel()
    if n and (labels.dim() != 1 or labels.is_floating_point()):
        raise ValueError(
            f"{place}['labels'] must be integers of shape (n,), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if boxes.shape != (n, 4) and (n or boxes.numel()):
        raise ValueError(
            f"{place}['boxes'] must have shape ({n}, 4) as there are {n} labels, "
            f"got {tuple(boxes.shape)}"
        )


def _floating(boxes: Tensor, like: Tensor | None) -> Tensor:
    if like is not None:
        return as_type(boxes, arithmetic_dtype(like))
    return boxes if boxes.is_floating_point() else boxes.to(torch.float32)
