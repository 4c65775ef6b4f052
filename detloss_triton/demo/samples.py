"""What the parts of the demo hand to one another: images with boxes, detections, requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]


class InputError(Exception):
    """A request that cannot be met: one line naming the argument and what was expected."""


@dataclass(frozen=True)
class Sample:
    """One square image and its true boxes.

    Shapes: image (S, S, 3) uint8 RGB; boxes (n, 4) float32 xyxy in pixels; labels (n,) int64 in
    [0, classes).
    """

    image: Array
    boxes: Array
    labels: Array


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, best first.

    Shapes: boxes (n, 4) float32 xyxy in pixels; scores (n,) in [0, 1]; labels (n,) int64.
    """

    boxes: Array
    scores: Array
    labels: Array


class ImageSource(Protocol):
    """Where training and validation images come from."""

    @property
    def class_names(self) -> Sequence[str]:
        """The name of each label."""

    @property
    def validation(self) -> Sequence[Sample]:
        """The held-out images, always the same."""

    def batch(self, size: int, share: slice = slice(None)) -> list[Sample]:
        """Draw the next `size` training images, and return a share of them."""


def stack_images(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Pack images into one float tensor (B, 3, S, S) with values in [0, 1].

    Channels stay innermost in memory, with which convolutions are faster.
    """
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).to(device)
    return images.permute(0, 3, 1, 2).float() / 255


def targets_of(samples: Sequence[Sample], device: torch.device) -> list[dict[str, Tensor]]:
    """Per image {"labels": (n,), "boxes": (n, 4) xyxy in pixels}."""
    return [
        {
            "labels": torch.from_numpy(sample.labels).to(device),
            "boxes": torch.from_numpy(sample.boxes).to(device),
        }
        for sample in samples
    ]
