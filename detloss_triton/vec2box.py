"""YOLOv9's anchors: from per-level predictions to one list of anchors and boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import at_least_float32

Level = tuple[Tensor, Tensor, Tensor]


class Vec2Box:
    """Anchor centres and strides of an image size, and the decoding of head outputs.

    Args:
        detector: called once on a blank image to find the strides where `strides` is None: it
            returns the main predictions, or (main, aux) predictions. Else unused, may be None.
        image_size: (height, width) in pixels.
        strides: of each level in pixels, or None.
        device: of the anchors.

    Attributes:
        anchor_grid: (A, 2) int64, centres (x, y) in pixels: i * stride + stride // 2.
        scaler: (A,) int64, the stride of each anchor.
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
        outputs = detector(torch.zeros(1, 3, *image_size, device=self.device))
        is_pair = isinstance(outputs, (tuple, list)) and isinstance(outputs[0][0], (tuple, list))
        levels = outputs[0] if is_pair else outputs
        return [image_size[1] // boxes.shape[-1] for _, _, boxes in levels]

    def update(self, image_size: tuple[int, int], device: str | torch.device) -> None:
        """Make the anchors of another image size (height, width), or on another device."""
        self.device = device
        height, width = image_size
        grids, scalers = [], []
        for stride in self.strides:
            x = torch.arange(width // stride, device=device) * stride + stride // 2
            y = torch.arange(height // stride, device=device) * stride + stride // 2
            y, x = torch.meshgrid(y, x, indexing="ij")
            grids.append(torch.stack([x, y], -1).flatten(0, 1))
            scalers.append(torch.full((x.numel(),), stride, device=device))
        self.anchor_grid = torch.cat(grids)
        self.scaler = torch.cat(scalers)

    def __call__(self, predicts: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
        """Flatten levels into one list of anchors.

        Shapes:
            predicts: per level (classes (B, C, h, w), distributions (B, 16, 4, h, w), ltrb
                distances in strides (B, 4, h, w)).
            returns: classes (B, A, C), distributions (B, A, 4, 16), boxes (B, A, 4) xyxy in pixels.
        """
        classes = torch.cat([c.flatten(2).transpose(1, 2) for c, _, _ in predicts], 1)
        anchors = torch.cat([a.flatten(3).permute(0, 3, 2, 1) for _, a, _ in predicts], 1)
        return classes, anchors, self.decode(predicts)

    def decode(self, predicts: Sequence[Level]) -> Tensor:
        """Boxes (B, A, 4) xyxy in pixels: centre -/+ ltrb stride; their columns are contiguous."""
        distances = torch.cat([b.flatten(2) for _, _, b in predicts], 2)
        # Half precision is 0.5 pixels at 640.
        distances = at_least_float32(distances) * self.scaler
        centre = self.anchor_grid.T
        boxes = torch.cat([centre - distances[:, :2], centre + distances[:, 2:]], 1)
        return boxes.transpose(1, 2)
