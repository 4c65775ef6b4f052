"""The ops, by family: importing this package fills the registry."""

from . import classification, coding, distribution, matching, regression

__all__ = ["classification", "coding", "distribution", "matching", "regression"]
