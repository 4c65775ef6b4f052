"""Which anchor of a dense head learns which target: what stands before a criterion.

Each assigner is called with a batch, waits for nothing, and returns an `Assignment`.
"""

from .assignment import Assignment
from .atss import ATSSAssigner
from .dynamic import DynamicSoftLabelAssigner, SimOTAAssigner
from .max_iou import MaxIoUAssigner

__all__ = [
    "ATSSAssigner",
    "Assignment",
    "DynamicSoftLabelAssigner",
    "MaxIoUAssigner",
    "SimOTAAssigner",
]
