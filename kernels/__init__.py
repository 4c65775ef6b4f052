"""Device code: Triton kernels and the pointer-free functions they are made of."""

from triton import __version__ as triton_version

from . import assignment, boxes, classes, distributions, matching, math, rows

__all__ = [
    "assignment",
    "boxes",
    "classes",
    "distributions",
    "matching",
    "math",
    "rows",
    "triton_version",
]
