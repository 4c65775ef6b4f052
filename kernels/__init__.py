"""Device code: Triton kernels and the pointer-free functions they are made of. Imports triton only."""

from triton import __version__ as triton_version

from . import boxes, classes, distributions, matching, math, rows

__all__ = ["boxes", "classes", "distributions", "matching", "math", "rows", "triton_version"]
