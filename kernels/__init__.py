"""Device code: Triton kernels and the pointer-free functions they are made of."""

from triton import __version__ as triton_version

from . import assignment, boxes, classes, distributions, matching, math, rows, selection

__all__ = [
    "assignment",
    "boxes",
    "classes",
    "distributions",
    "matching",
    "math",
    "rows",
    "selection",
    "triton_version",
]
