"""The criteria, one file each: they match, gather, name and weight; the losses are ops."""

from .atss import ATSSCriterion
from .detr import DetrCriterion
from .dfine import DFINECriterion
from .rtmdet import RTMDetCriterion
from .ssd import SSDCriterion
from .yolov9 import YOLOv9Criterion
from .yolox import YOLOXCriterion

__all__ = [
    "ATSSCriterion",
    "DFINECriterion",
    "DetrCriterion",
    "RTMDetCriterion",
    "SSDCriterion",
    "YOLOXCriterion",
    "YOLOv9Criterion",
]
