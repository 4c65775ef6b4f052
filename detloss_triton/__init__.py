"""Losses of object-detection training: exact, fused, without host synchronisation."""

from . import anchors, assigners, functional
from .backend import use_backend
from .coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from .criteria import (
    ATSSCriterion,
    DetrCriterion,
    DFINECriterion,
    RTMDetCriterion,
    SSDCriterion,
    YOLOv9Criterion,
    YOLOXCriterion,
)
from .criteria.total import sum_losses
from .denoising import Denoising, denoising_queries
from .detectors import ATSSLoss, RTMDetLoss, SSDLoss, YOLOv9Loss, YOLOXLoss
from .functional import smooth_l1_loss
from .graphs import graphed
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
from .matchers import BoxMatcher, HungarianMatcher
from .targets import Targets, normalised_targets, pad_targets
from .validate import validation
from .vec2box import Vec2Box

__version__ = "0.1.0"

__all__ = [
    "ATSSCriterion",
    "ATSSLoss",
    "BCELoss",
    "BoxLoss",
    "BoxMatcher",
    "CrossEntropyLoss",
    "CrossSigmoidFocalLoss",
    "DFINECriterion",
    "DFLoss",
    "DeltaXYWHBBoxCoder",
    "Denoising",
    "DetrCriterion",
    "DistancePointBBoxCoder",
    "GIoULoss",
    "HungarianMatcher",
    "IoULoss",
    "L1Loss",
    "QualityFocalLoss",
    "RTMDetCriterion",
    "RTMDetLoss",
    "SSDCriterion",
    "SSDLoss",
    "Targets",
    "Vec2Box",
    "YOLOXCriterion",
    "YOLOXLoss",
    "YOLOv9Criterion",
    "YOLOv9Loss",
    "anchors",
    "assigners",
    "denoising_queries",
    "functional",
    "graphed",
    "normalised_targets",
    "pad_targets",
    "smooth_l1_loss",
    "sum_losses",
    "use_backend",
    "validation",
]


def __dir__() -> list[str]:
    """The public names: importing them binds modules here too, which are no part of the API."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
