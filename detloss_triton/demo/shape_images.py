"""Images of coloured shapes on noisy backgrounds, drawn when they are asked for."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .samples import Array, Sample

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross")
VALIDATION_IMAGES = 96
MOST_SHAPES = 6
# Radii as fractions of the image side: from a few pixels, which only the finest stride can
# find, to half the image.
SMALLEST_RADIUS, LARGEST_RADIUS = 0.05, 0.24
MOST_OVERLAP = 0.15
PLACING_ATTEMPTS = 10
# Shapes are drawn this many times larger and scaled down, which smooths their edges.
SUPERSAMPLING = 2


def _regular(corners: int, radii: Sequence[float]) -> Array:
    """Corner points (corners, 2) around the origin, the radii taken in turn."""
    angles = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
    radius = np.resize(np.asarray(radii), corners)
    return np.stack([np.cos(angles) * radius, np.sin(angles) * radius], axis=1)


def _cross(arm: float) -> Array:
    """Corner points (12, 2) of a plus sign of half-width 1 with arms of half-width `arm`."""
    quarter = np.array([[arm, arm], [arm, 1.0], [-arm, 1.0]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


OUTLINES = {
    "circle": _regular(48, [1.0]),
    "square": _regular(4, [1.0]),
    "triangle": _regular(3, [1.0]),
    "star": _regular(10, [1.0, 0.42]),
    "cross": _cross(0.32) / math.hypot(1.0, 0.32),
}


class ShapeImages:
    """An endless source of shape images; the same seed draws the same images in the same order."""

    class_names: Sequence[str] = CLASS_NAMES

    def __init__(self, image_size: int, seed: int) -> None:
        self.image_size = image_size
        training, validation = np.random.SeedSequence(seed).spawn(2)
        self._rng = np.random.default_rng(training)
        held_out = np.random.default_rng(validation)
        self.validation = [self.draw(held_out) for _ in range(VALIDATION_IMAGES)]

    def batch(self, size: int, share: slice = slice(None)) -> list[Sample]:
        """Draw the next `size` training images, and return a share of them."""
        return [self.draw(self._rng) for _ in range(size)][share]

    def draw(self, rng: np.random.Generator) -> Sample:
        """Draw one image holding 1 to `MOST_SHAPES` shapes that overlap little."""
        boxes: list[list[float]] = []
        labels: list[int] = []
        canvas = self._background(rng)
        pen = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(1, MOST_SHAPES + 1)):
            label = int(rng.integers(len(CLASS_NAMES)))
            for _ in range(PLACING_ATTEMPTS):
                outline = self._place(rng, CLASS_NAMES[label])
                box = [*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()]
                if all(_overlap(box, other) <= MOST_OVERLAP for other in boxes):
                    break
            else:
                continue
            corners = (SUPERSAMPLING * outline).ravel().tolist()
            pen.polygon(corners, fill=_vivid(rng), outline=_dark(rng), width=SUPERSAMPLING)
            boxes.append(box)
            labels.append(label)
        image = np.asarray(canvas.reduce(SUPERSAMPLING), np.int16)
        grain = rng.integers(-12, 13, image.shape[:2], np.int16)[..., None]
        return Sample(
            image=(image + grain).clip(0, 255).astype(np.uint8),
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels, np.int64),
        )

    def _place(self, rng: np.random.Generator, name: str) -> Array:
        """Scale, turn and move an outline to a random place inside the image."""
        # Uniform in the logarithm: as many small shapes as large ones.
        radius = self.image_size * math.exp(
            rng.uniform(math.log(SMALLEST_RADIUS), math.log(LARGEST_RADIUS))
        )
        turn = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(turn), math.sin(turn)
        outline = radius * OUTLINES[name] @ np.array([[cos, sin], [-sin, cos]])
        low, high = -outline.min(axis=0), self.image_size - outline.max(axis=0)
        return outline + rng.uniform(low, high)

    def _background(self, rng: np.random.Generator) -> Image.Image:
        """Blend dull patches and thin stray lines, so that an edge alone is no sign of a shape."""
        side = self.image_size * SUPERSAMPLING
        cells = int(rng.integers(2, 9))
        base = rng.integers(40, 170)
        patches = (
            base
            + rng.integers(-35, 36, (cells, cells, 1))
            + rng.integers(-18, 19, (cells, cells, 3))
        )
        canvas = Image.fromarray(patches.clip(0, 255).astype(np.uint8))
        canvas = canvas.resize((self.image_size,) * 2, Image.Resampling.BILINEAR)
        # Smooth patches need no supersampling: the cheapest way up will do.
        canvas = canvas.resize((side, side), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(0, 7)):
            grey = int(base + rng.integers(-60, 61))
            ends = [float(v) for v in rng.uniform(0, side, 4)]
            pen.line(ends, fill=(grey, grey, grey), width=int(rng.integers(1, 4)))
        return canvas


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over the smaller of two xyxy boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    smaller = min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))
    return max(width, 0.0) * max(height, 0.0) / smaller


def _vivid(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.55, 1.0), rng.uniform(0.7, 1.0))
    return int(255 * r), int(255 * g), int(255 * b)


def _dark(rng: np.random.Generator) -> tuple[int, int, int]:
    grey = int(rng.integers(10, 60))
    return grey, grey, grey
