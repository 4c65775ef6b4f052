"""Device code: Triton kernels and the pointer-free functions they are made of."""

from triton import __version__ as triton_version

from . import (
    aligned,
    alignment,
    assigning,
    assignment,
    atss,
    boxes,
    classes,
    dense,
    distributions,
    dynamic,
    matching,
    math,
    mined,
    packing,
    positives,
    queries,
    rows,
    selection,
    totals,
)

__all__ = [
    "aligned",
    "alignment",
    "assigning",
    "assignment",
    "atss",
    "boxes",
    "classes",
    "dense",
    "distributions",
    "dynamic",
    "matching",
    "math",
    "mined",
    "packing",
    "positives",
    "queries",
    "rows",
    "selection",
    "totals",
    "triton_version",
]
