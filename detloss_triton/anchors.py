"""Where a dense head looks: points and anchors of all levels, built once per image size and kept.

What the functions return is shared by all who ask for the same: do not modify it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .engine.modes import is_compiling
from .shapes import check_shapes

Size = tuple[int, int]
# Sets of anchors that are kept: a few image sizes of a few detectors.
_KEPT = 64


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _kept(function: _Function) -> _Function:
    """Have what is made for some arguments kept; a graph that is traced makes its own."""
    # It is made apart from any mode a caller is in, as others will use it in theirs.
    kept = functools.lru_cache(_KEPT)(torch.inference_mode(False)(function))

    @functools.wraps(function)
    def make(*args: Any) -> Any:
        return function(*args) if is_compiling() else kept(*args)

    return make  # type: ignore[return-value]


class Anchors(NamedTuple):
    """Anchors of a head's levels, level by level, row by row, all of a position together.

    Shapes:
        boxes: (A, 4) xyxy in pixels.
        sizes: the number of anchors of each level, A in all.
    """

    boxes: Tensor
    sizes: tuple[int, ...]


def points(
    map_sizes: Sequence[Size],
    strides: Sequence[float],
    offset: float = 0.5,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(A, 4) rows [x, y, stride, stride]: the positions of every level, in pixels.

    Args:
        map_sizes: (height, width) of each level's feature map.
        offset: where a position lies in its cell, in strides: 0.5 for YOLOX, 0 for RTMDet.

    Raises:
        ValueError: unless there is one positive stride per level.
    """
    sizes = _checked("points", map_sizes, strides)
    return _points(sizes, tuple(map(float, strides)), float(offset), torch.device(device))


def cells(
    map_sizes: tuple[Size, ...], strides: tuple[int, ...], device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """((A, 2) int64 centres (x, y) in whole pixels, (A,) int64 strides), as YOLOv9 has them."""
    return _cells(map_sizes, strides, torch.device(device))


@_kept
def _cells(
    map_sizes: tuple[Size, ...], strides: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    grids, scalers = [], []
    for (h, w), stride in zip(map_sizes, strides, strict=True):
        x = torch.arange(w, device=device) * stride + stride // 2
        y = torch.arange(h, device=device) * stride + stride // 2
        y, x = torch.meshgrid(y, x, indexing="ij")
        grids.append(torch.stack([x, y], -1).flatten(0, 1))
        scalers.append(torch.full((x.numel(),), stride, device=device))
    return torch.cat(grids), torch.cat(scalers)


def grid_anchors(
    map_sizes: Sequence[Size],
    strides: Sequence[float],
    scales: Sequence[float] = (8.0,),
    ratios: Sequence[float] = (1.0,),
    offset: float = 0.0,
    device: str | torch.device = "cpu",
) -> Anchors:
    """Anchors of every ratio (height / width) and scale (in strides), ratio by ratio: by default
    those of ATSS, a square of 8 strides at each position.

    Raises:
        ValueError: unless there is one positive stride per level.
    """
    levels = [
        [
            (stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio))
            for ratio in ratios
            for scale in scales
        ]
        for stride in strides
    ]
    return _anchors("grid_anchors", map_sizes, strides, levels, offset, device)


def clustered_anchors(
    map_sizes: Sequence[Size],
    strides: Sequence[float],
    widths: Sequence[Sequence[float]],
    heights: Sequence[Sequence[float]],
    device: str | torch.device = "cpu",
) -> Anchors:
    """SSD's anchors of sizes that were clustered from a data set, as OTX has them.

    Args:
        widths, heights: of each level the anchors of a position, in pixels.

    Raises:
        ValueError: unless there are one positive stride and as many widths as heights per level.
    """
    levels = [list(zip(*level, strict=True)) for level in zip(widths, heights, strict=True)]
    return _anchors("clustered_anchors", map_sizes, strides, levels, 0.5, device)


def default_boxes(
    map_sizes: Sequence[Size],
    image_size: Size,
    aspect_ratios: Sequence[Sequence[float]],
    scales: Sequence[float],
    steps: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Anchors:
    """SSD's default boxes (Liu et al., 2016, https://arxiv.org/abs/1512.02325), as torchvision's
    `DefaultBoxGenerator` has them.

    A position of level i has squares of s_i and of sqrt(s_i s_(i+1)), then of each ratio r boxes
    of s_i sqrt(r) by s_i / sqrt(r) and the reverse, sides of at most the image's.

    Args:
        image_size: (height, width) in pixels.
        aspect_ratios: of each level.
        scales: of each level and one more, as parts of the image.
        steps: pixels between positions; by default the image is divided by the map.

    Raises:
        ValueError: unless there are one list of ratios and one step per level, and one scale more.
    """
    height, width = image_size
    if len(scales) != len(map_sizes) + 1 or len(aspect_ratios) != len(map_sizes):
        raise ValueError(
            f"default_boxes: {len(map_sizes)} levels need as many aspect_ratios and one scale "
            f"more, got {len(aspect_ratios)} and {len(scales)}"
        )
    levels = []
    for i, ratios in enumerate(aspect_ratios):
        both = math.sqrt(scales[i] * scales[i + 1])
        shapes = [(scales[i], scales[i]), (both, both)]
        for ratio in ratios:
            w, h = scales[i] * math.sqrt(ratio), scales[i] / math.sqrt(ratio)
            shapes += [(w, h), (h, w)]
        levels.append([(width * min(w, 1.0), height * min(h, 1.0)) for w, h in shapes])
    strides = [
        (width / w, height / h) if steps is None else (steps[i], steps[i])
        for i, (h, w) in enumerate(map_sizes)
    ]
    return _anchors("default_boxes", map_sizes, strides, levels, 0.5, device)


def inside(anchors: Tensor, image_size: Size, border: float = 0.0) -> Tensor:
    """(A,) whether anchors (A, 4) stay within an image (height, width), or a border around it."""
    check_shapes("inside", anchors=(anchors, ("A", 4)))
    height, width = image_size
    x1, y1, x2, y2 = anchors.unbind(1)
    low = (x1 >= -border) & (y1 >= -border)
    return low & (x2 < width + border) & (y2 < height + border)


def _checked(
    place: str, map_sizes: Sequence[Size], strides: Sequence[float | tuple[float, float]]
) -> tuple[Size, ...]:
    smallest = [min(s) if isinstance(s, tuple) else s for s in strides]
    if len(strides) != len(map_sizes) or min(smallest, default=1) <= 0:
        raise ValueError(
            f"{place}: {len(map_sizes)} levels need as many positive strides, got {[*strides]}"
        )
    return tuple((int(h), int(w)) for h, w in map_sizes)


def _anchors(
    place: str,
    map_sizes: Sequence[Size],
    strides: Sequence[float | tuple[float, float]],
    levels: Sequence[Sequence[tuple[float, float]]],
    offset: float,
    device: str | torch.device,
) -> Anchors:
    sizes = _checked(place, map_sizes, strides)
    if len(levels) != len(sizes):
        raise ValueError(f"{place}: {len(sizes)} levels, got anchors of {len(levels)}")
    pairs = tuple(s if isinstance(s, tuple) else (s, s) for s in strides)
    shapes = tuple(tuple(level) for level in levels)
    return _boxes(sizes, pairs, shapes, float(offset), torch.device(device))


@_kept
def _points(
    map_sizes: tuple[Size, ...], strides: tuple[float, ...], offset: float, device: torch.device
) -> Tensor:
    levels = []
    for size, stride in zip(map_sizes, strides, strict=True):
        centres = _centres(size, (stride, stride), offset, device)
        levels.append(torch.cat([centres, torch.full_like(centres, stride)], 1))
    return torch.cat(levels)


@_kept
def _boxes(
    map_sizes: tuple[Size, ...],
    strides: tuple[tuple[float, float], ...],
    shapes: tuple[tuple[tuple[float, float], ...], ...],
    offset: float,
    device: torch.device,
) -> Anchors:
    levels = []
    for size, stride, shape in zip(map_sizes, strides, shapes, strict=True):
        centre = _centres(size, stride, offset, device).unsqueeze(1)
        half = torch.tensor(shape, device=device) / 2
        levels.append(torch.cat([centre - half, centre + half], 2).flatten(0, 1))
    return Anchors(torch.cat(levels), tuple(map(len, levels)))


def _centres(
    size: Size, stride: tuple[float, float], offset: float, device: torch.device
) -> Tensor:
    """(height * width, 2) positions (x, y), row by row."""
    height, width = size
    x = (torch.arange(width, device=device) + offset) * stride[0]
    y = (torch.arange(height, device=device) + offset) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
