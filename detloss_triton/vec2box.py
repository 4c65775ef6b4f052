"""YOLOv9's anchors: from per-level predictions to one list of anchors and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .anchors import cells
from .boxes import from_ltrb
from .shapes import check_shapes

Level = tuple[Tensor, Tensor, Tensor]
Size = tuple[int, int]


class Vec2Box:
    """Anchor centres and strides of an image size, and the decoding of head outputs.

    Those of a size are made once and kept, for all who ask for the same: do not modify them.

    Args:
        detector: called once on a blank image to find the strides where `strides` is None: it
            returns the main predictions, or (main, aux) predictions. Else unused, may be None.
        image_size: (height, width) in pixels.
        strides: of each level in pixels, or None.
        device: of the anchors.

    Attributes:
        anchor_grid: (A, 2) int64, centres (x, y) in pixels: i * stride + stride // 2.
        scaler: (A,) int64, the stride of each anchor.
        map_sizes: (h, w) of each level, (height // stride, width // stride): rounded down, so a
            model that rounds up needs images of a multiple of all strides.

    Raises:
        ValueError: for strides that are not positive, or an image size that is no pair; where
            `strides` is None, for a detector's map that no stride, or more than one, gives.
    """

    def __init__(
        self,
        detector: Callable[[Tensor], Any] | None,
        image_size: tuple[int, int],
        strides: Sequence[int] | None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = device
        if strides is None:
            if detector is None:
                raise ValueError("strides: expected a list where there is no detector, got None")
            strides = self.create_auto_anchor(detector, image_size)
        self.strides = list(strides)
        self.update(image_size, device)

    def create_auto_anchor(
        self, detector: Callable[[Tensor], Any], image_size: tuple[int, int]
    ) -> list[int]:
        """Strides of a detector's levels, from the size of its outputs for a blank image."""
        image_size = _pair(image_size)
        outputs = detector(torch.zeros(1, 3, *image_size, device=self.device))
        is_pair = isinstance(outputs, (tuple, list)) and isinstance(outputs[0][0], (tuple, list))
        levels = outputs[0] if is_pair else outputs
        return [
            _stride_of(i, image_size, tuple(boxes.shape[-2:]))
            for i, (_, _, boxes) in enumerate(levels)
        ]

    def update(self, image_size: tuple[int, int], device: str | torch.device) -> None:
        """Make the anchors of another image size (height, width), or on another device."""
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must be positive, one per level, got {self.strides}")
        self.device = device
        self.image_size = height, width = _pair(image_size)
        self.map_sizes = [(height // stride, width // stride) for stride in self.strides]
        sizes = tuple(self.map_sizes)
        self.anchor_grid, self.scaler = cells(sizes, tuple(self.strides), device)

    def __call__(self, predicts: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
        """Flatten levels into one list of anchors.

        Shapes:
            predicts: per level (classes (B, C, h, w), distributions (B, 16, 4, h, w), ltrb
                distances in strides (B, 4, h, w)).
            returns: classes (B, A, C), distributions (B, A, 4, 16), boxes (B, A, 4) xyxy in pixels.
        """
        for i, (classes, distributions, distances) in enumerate(predicts):
            check_shapes(
                f"{type(self).__name__}: level {i}",
                classes=(classes, ("B", "C", "h", "w")),
                distributions=(distributions, ("B", "bins", 4, "h", "w")),
                distances=(distances, ("B", 4, "h", "w")),
            )
        return *flattened(predicts), self.decode(predicts)

    def decode(self, predicts: Sequence[Level]) -> Tensor:
        """Boxes (B, A, 4) xyxy in pixels: the centre -/+ ltrb distances times the stride."""
        return decoded(predicts, self.anchor_grid, self.scaler)


def flattened(predicts: Sequence[Level]) -> tuple[Tensor, Tensor]:
    """Classes (B, A, C) and distributions (B, A, 4, bins) of all levels."""
    classes = torch.cat([c.flatten(2).transpose(1, 2) for c, _, _ in predicts], 1)
    return classes, torch.cat([a.flatten(3).permute(0, 3, 2, 1) for _, a, _ in predicts], 1)


def decoded(predicts: Sequence[Level], anchor_grid: Tensor, scaler: Tensor) -> Tensor:
    """See `Vec2Box.decode`."""
    distances = torch.cat([b.flatten(2) for _, _, b in predicts], 2)
    return from_ltrb(distances, anchor_grid, scaler).transpose(1, 2)


def _pair(image_size: Any) -> Size:
    if not isinstance(image_size, Iterable) or len(size := tuple(image_size)) != 2:
        raise ValueError(f"image_size must be (height, width), got {image_size}")
    return size


def _stride_of(level: int, image_size: Size, size: Size) -> int:
    """The stride at which an image has a map of that size."""
    height, width = image_size
    stride = width // size[1]
    fits = [s for s in range(1, width + 1) if (height // s, width // s) == size]
    is_exact = image_size == (size[0] * stride, size[1] * stride)
    if not is_exact and len(fits) != 1:
        raise ValueError(
            f"detector, level {level}: a map of (h, w) = {size} for an image of {image_size} does "
            "not tell its stride; give `strides`, or an image_size that is a multiple of them"
        )
    return stride


def check_vec2box(place: str, vec2box: Any) -> None:
    """Raise unless an object, perhaps another library's, has what a criterion reads of it."""
    names = ("anchor_grid", "scaler", "strides")
    missing = [name for name in names if getattr(vec2box, name, None) is None]
    if missing:
        raise ValueError(
            f"{place}: vec2box must have anchor_grid (A, 2), scaler (A,) and strides, got a "
            f"{type(vec2box).__name__} without {', '.join(missing)}"
        )
    check_shapes(
        f"{place}: vec2box",
        anchor_grid=(vec2box.anchor_grid, ("A", 2)),
        scaler=(vec2box.scaler, ("A",)),
    )


def map_sizes(vec2box: Any) -> list[Size] | None:
    """(h, w) of each level, read from the anchors where the object does not say; None where these
    form no grid.
    """
    sizes = getattr(vec2box, "map_sizes", None) or _read_sizes(vec2box)
    return sizes if sum(h * w for h, w in sizes) == len(vec2box.anchor_grid) else None


def _read_sizes(vec2box: Any) -> list[Size]:
    sizes = []
    for stride in vec2box.strides:
        centres = vec2box.anchor_grid[vec2box.scaler == stride]
        width, height = (len(column.unique()) for column in centres.unbind(1))
        sizes.append((height, width))
    return sizes


def why_no_fit(vec2box: Any, sizes: Sequence[Size], expected: Sequence[Size]) -> str:
    """What to do about maps of other sizes than an image's anchors have."""
    if sorted(sizes) == sorted(expected):
        return f"its levels are in another order than vec2box's strides {list(vec2box.strides)}"
    if [size[::-1] for size in sizes] == list(expected):
        return "height and width are swapped; image_size of vec2box is (height, width)"
    image_size = getattr(vec2box, "image_size", (0, 0))
    multiple = math.lcm(*map(int, vec2box.strides))
    is_rounded_otherwise = all(
        abs(n - known) <= 1
        for size, known_size in zip(sizes, expected, strict=True)
        for n, known in zip(size, known_size, strict=True)
    )
    if is_rounded_otherwise and any(side % multiple for side in image_size):
        larger = tuple(-(-side // multiple) * multiple for side in image_size)
        return (
            f"image_size {image_size} is no multiple of every stride, and vec2box rounds down; "
            f"take images of a multiple of {multiple} pixels, such as {larger}"
        )
    return (
        f"vec2box has maps of {list(expected)}; for images of another size call "
        "vec2box.update((height, width), device)"
    )
