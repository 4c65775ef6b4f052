"""Detectors that look at every pixel of three levels, trained with the whole losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import ATSSLoss, RTMDetLoss, SSDLoss, YOLOXLoss, sum_losses
from detloss_triton.anchors import grid_anchors
from detloss_triton.detectors.whole import PriorLoss

from .backbone import STRIDES, UNLIKELY, Pyramid, branch
from .decode import detections
from .samples import Detections, Sample, targets_of

CHANNELS = 64
# Sides of the anchors at a position, in strides.
ATSS_ANCHORS = partial(grid_anchors, strides=STRIDES, scales=(4.0,))
SSD_SCALES = (2.0, 2.0 * 2**0.5)
SSD_ANCHORS = partial(grid_anchors, strides=STRIDES, scales=SSD_SCALES, offset=0.5)

# By argument of the loss, a map of each level.
Maps = dict[str, list[Tensor]]


class DenseDetector(nn.Module, ABC):
    """A branch for each kind of map that a loss takes.

    Called as torchvision's detectors are: in training mode with samples it returns a dictionary of
    losses, `total_loss` among them; in evaluation mode one `Detections` per image.

    Args:
        outputs: by kind of map its channels, and what they start around.
    """

    def __init__(
        self, loss: PriorLoss, outputs: dict[str, tuple[int, float]], device: torch.device
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(CHANNELS)
        self.branches: Any = nn.ModuleDict(
            {
                name: nn.ModuleList(branch(CHANNELS, n, bias) for _ in STRIDES)
                for name, (n, bias) in outputs.items()
            }
        )
        self.criterion = loss
        self.to(device)

    @abstractmethod
    def scores(self, maps: Maps) -> Tensor:
        """(B, A, C) in [0, 1]."""

    def maps(self, images: Tensor) -> Maps:
        """What the loss takes, of images (B, 3, S, S) in [0, 1]."""
        levels = self.pyramid(images)
        return {
            name: [layers(level) for layers, level in zip(of_kind, levels, strict=True)]
            for name, of_kind in self.branches.items()
        }

    def forward(
        self, images: Tensor, samples: Sequence[Sample] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Shapes: images (B, 3, S, S) in [0, 1]."""
        maps = self.maps(images)
        if self.training:
            assert samples is not None
            losses = self.criterion(**maps, targets=targets_of(samples, images.device))
            terms = {name: sum_losses({name: loss}) for name, loss in losses.items()}
            return {**terms, "total_loss": sum_losses(terms)}
        boxes = self.criterion.decode(maps["bbox_pred"])
        return detections(self.scores(maps), boxes, images.shape[-1])

    def rows(self, maps: Maps, name: str) -> Tensor:
        """(B, A, features), where a pixel has one anchor."""
        return self.criterion.rows(name, maps[name], maps[name][0].shape[1])


class ATSSDetector(DenseDetector):
    """Boxes as deltas of a square at each pixel, and how central that is in its box."""

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        outputs = {**_outputs(num_classes), "centerness": (1, 0.0)}
        super().__init__(ATSSLoss(num_classes, ATSS_ANCHORS), outputs, device)

    def scores(self, maps: Maps) -> Tensor:
        return (
            self.rows(maps, "cls_score").sigmoid() * self.rows(maps, "centerness").sigmoid()
        ).sqrt()


class RTMDetDetector(DenseDetector):
    """Boxes as distances from each pixel to the sides."""

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        super().__init__(RTMDetLoss(num_classes, STRIDES), _outputs(num_classes), device)

    def maps(self, images: Tensor) -> Maps:
        maps = super().maps(images)
        pairs = zip(maps["bbox_pred"], STRIDES, strict=True)
        return {**maps, "bbox_pred": [level.exp() * stride for level, stride in pairs]}

    def scores(self, maps: Maps) -> Tensor:
        return self.rows(maps, "cls_score").sigmoid()


class SSDDetector(DenseDetector):
    """Boxes as deltas of two squares at each pixel; background is a class."""

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        n = len(SSD_SCALES)
        outputs = {"cls_score": (n * (num_classes + 1), 0.0), "bbox_pred": (n * 4, 0.0)}
        super().__init__(SSDLoss(num_classes, SSD_ANCHORS), outputs, device)
        self.num_classes = num_classes

    def scores(self, maps: Maps) -> Tensor:
        logits = self.criterion.rows("cls_score", maps["cls_score"], self.num_classes + 1)
        return logits.softmax(2)[..., :-1]


class YOLOXDetector(DenseDetector):
    """Boxes as shifts and sizes of a cell, and whether there is an object."""

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        outputs = {**_outputs(num_classes), "objectness": (1, UNLIKELY)}
        super().__init__(YOLOXLoss(num_classes, STRIDES, use_l1=True), outputs, device)

    def scores(self, maps: Maps) -> Tensor:
        return self.rows(maps, "cls_score").sigmoid() * self.rows(maps, "objectness").sigmoid()


def _outputs(num_classes: int) -> dict[str, tuple[int, float]]:
    return {"cls_score": (num_classes, UNLIKELY), "bbox_pred": (4, 0.0)}
