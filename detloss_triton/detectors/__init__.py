"""Whole losses: from a head's raw maps and the images' boxes to a criterion's dictionary.

One of each detector, which decodes, assigns, counts and calls its criterion, for all images at
once and without waiting for the device.
"""

from .atss import ATSSLoss
from .rtmdet import RTMDetLoss
from .ssd import SSDLoss
from .yolov9 import YOLOv9Loss
from .yolox import YOLOXLoss

__all__ = ["ATSSLoss", "RTMDetLoss", "SSDLoss", "YOLOXLoss", "YOLOv9Loss"]
