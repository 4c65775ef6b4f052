"""Losses of object-detection training: exact, fused, without host synchronisation."""

from . import functional
from .backend import use_backend
from .coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from .criteria import (
    ATSSCriterion,
    RTMDetCriterion,
    SSDCriterion,
    YOLOv9Criterion,
    YOLOXCriterion,
)
from .functional import smooth_l1_loss
from .losses import (
    BCELoss,
    BoxLoss,
    CrossEntropyLoss,
    CrossSigmoidFocalLoss,
    DFLoss,
    GIoULoss,
    IoULoss,
    L1Loss,
    QualityFocalLoss,
)
from .matchers import BoxMatcher
from .vec2box import Vec2Box

__version__ = "0.1.0"

__all__ = [
    "ATSSCriterion",
    "BCELoss",
    "BoxLoss",
    "BoxMatcher",
    "CrossEntropyLoss",
    "CrossSigmoidFocalLoss",
    "DFLoss",
    "DeltaXYWHBBoxCoder",
    "DistancePointBBoxCoder",
    "GIoULoss",
    "IoULoss",
    "L1Loss",
    "QualityFocalLoss",
    "RTMDetCriterion",
    "SSDCriterion",
    "Vec2Box",
    "YOLOXCriterion",
    "YOLOv9Criterion",
    "functional",
    "smooth_l1_loss",
    "use_backend",
]
