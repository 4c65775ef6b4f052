"""The detectors that `detloss train --criterion` chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .dense import ATSSDetector, RTMDetDetector, SSDDetector, YOLOXDetector
from .detr import DetrDetector
from .dfine import DFINEDetector
from .yolov9 import YOLOv9Detector


@dataclass(frozen=True)
class Recipe:
    """A detector with its criterion, and how to train it.

    `build` is called with the number of classes, the side of the square images and the device. Its
    result maps images and samples to a dictionary of losses in training mode, `total_loss` among
    them, and images to one `Detections` each in evaluation mode.
    """

    build: Callable[[int, int, torch.device], nn.Module]
    steps: int
    learning_rate: float


RECIPES = {
    "atss": Recipe(ATSSDetector, steps=500, learning_rate=4e-3),
    "detr": Recipe(DetrDetector, steps=500, learning_rate=4e-3),
    "dfine": Recipe(DFINEDetector, steps=500, learning_rate=4e-3),
    "rtmdet": Recipe(RTMDetDetector, steps=500, learning_rate=8e-3),
    "ssd": Recipe(SSDDetector, steps=500, learning_rate=4e-3),
    "yolov9": Recipe(YOLOv9Detector, steps=500, learning_rate=8e-3),
    "yolox": Recipe(YOLOXDetector, steps=500, learning_rate=4e-3),
}
