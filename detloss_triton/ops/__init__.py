"""The ops, by family: importing this package fills the registry."""

from . import assignment, classification, coding, distribution, matching, regression, selection

__all__ = [
    "assignment",
    "classification",
    "coding",
    "distribution",
    "matching",
    "regression",
    "selection",
]
