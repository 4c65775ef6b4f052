"""The ops, by family: importing this package fills the registry."""

from . import (
    aligned,
    alignment,
    assignment,
    classification,
    coding,
    dense,
    distribution,
    matching,
    mined,
    packing,
    positives,
    queries,
    regression,
    selection,
    total,
)

__all__ = [
    "aligned",
    "alignment",
    "assignment",
    "classification",
    "coding",
    "dense",
    "distribution",
    "matching",
    "mined",
    "packing",
    "positives",
    "queries",
    "regression",
    "selection",
    "total",
]
