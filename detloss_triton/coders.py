"""Box coders: between boxes and what a head regresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .boxes import ltrb
from .ops import coding
from .precision import at_least_float32
from .settings import fused
from .shapes import Dimensions, check_shapes

MaxShape = Sequence[int] | Tensor | None
# The least ratio of sides, or their largest inverse, that deltas decode to.
_RATIO_CLIP = 16 / 1000


def _clipped(boxes: Tensor, max_shape: MaxShape) -> Tensor:
    """Boxes xyxy cut at the image border: one (height, width, ...) for all, or one per image."""
    if max_shape is None:
        return boxes
    limits = torch.as_tensor(max_shape, dtype=boxes.dtype, device=boxes.device)[..., :2]
    limits = limits.flip(-1).repeat((1,) * (limits.dim() - 1) + (2,))
    if limits.dim() == 2 and boxes.dim() == 3:
        limits = limits.unsqueeze(1)
    return torch.minimum(boxes.clamp(min=0), limits)


def _check(
    coder: object,
    codes: tuple[str, Any],
    origins: tuple[str, Any],
    columns: int,
    weight: Tensor | None = None,
) -> None:
    """Raise unless codes (or boxes) are (..., 4), and what they start from has their rows.

    Origins may lack leading dimensions, as anchors that all images share.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another shape; it names coder and argument.
    """
    place = type(coder).__name__
    (name, x), (origin, y) = codes, origins
    arguments: dict[str, tuple[Any, Dimensions]] = {name: (x, (..., 4))}
    if weight is not None:
        arguments["weight"] = (weight, (...,))
    check_shapes(place, **arguments)
    # Points may have strides beside them.
    is_wide = columns == 2 and isinstance(y, Tensor) and y.dim() > 0 and y.shape[-1] > 2
    check_shapes(place, **{origin: (y, (..., "columns" if is_wide else columns))})
    rows, given = x.shape[:-1], y.shape[:-1]
    if len(given) > len(rows) or rows[len(rows) - len(given) :] != given:
        raise ValueError(
            f"{place}: {origin} must have the rows of {name}, {tuple(rows)} or the last of these "
            f"dimensions, got {tuple(y.shape)}"
        )


class DeltaXYWHBBoxCoder:
    """R-CNN deltas (Girshick et al., 2014): centre shifts over size, and logarithms of size ratios.

    dx = (gx - px) / pw, dy = (gy - py) / ph, dw = log(gw / pw), dh = log(gh / ph), then
    (delta - mean) / std.

    Args:
        encode_size: length of the code; 4.
        target_means, target_stds: of the four deltas.
        clip_border: whether `decode` clips boxes at `max_shape`.
        add_ctr_clamp, ctr_clamp: clamp the decoded centre's shift to `ctr_clamp` pixels (YOLOF).
    """

    def __init__(
        self,
        encode_size: int = 4,
        target_means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        target_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        clip_border: bool = True,
        add_ctr_clamp: bool = False,
        ctr_clamp: int = 32,
    ) -> None:
        for name, value in (("target_means", target_means), ("target_stds", target_stds)):
            if len(value) != 4:
                raise ValueError(f"{name} must hold 4 numbers, got {len(value)}")
        self.encode_size = encode_size
        self.means = tuple(target_means)
        self.stds = tuple(target_stds)
        self.clip_border = clip_border
        self.add_ctr_clamp = add_ctr_clamp
        self.ctr_clamp = ctr_clamp

    @fused
    def encode(self, bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """Deltas (..., 4) that turn `bboxes` into `gt_bboxes`, both (..., 4) xyxy."""
        _check(self, ("gt_bboxes", gt_bboxes), ("bboxes", bboxes), 4)
        pair = at_least_float32(bboxes), at_least_float32(gt_bboxes)
        return coding.delta_encode(*pair, self.means, self.stds)

    def term(self) -> tuple[str, tuple[float, ...]]:
        """The op that decodes, without an image to clip at, and its constants."""
        shift = float(self.ctr_clamp) if self.add_ctr_clamp else 0.0
        return "deltas", (*self.means, *self.stds, abs(math.log(_RATIO_CLIP)), shift)

    @fused
    def decode(
        self,
        bboxes: Tensor,
        pred_bboxes: Tensor,
        max_shape: MaxShape = None,
        wh_ratio_clip: float = _RATIO_CLIP,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Boxes (..., 4) xyxy from deltas.

        Args:
            bboxes: (..., 4) xyxy, the anchors. pred_bboxes: (..., 4), the deltas.
            max_shape: (height, width) to clip at, or one per image (B, 2) for (B, N, 4) boxes.
            wh_ratio_clip: |dw|, |dh| are clamped to |log(wh_ratio_clip)|.
            weight: (...,), a factor of each box; one of weight 0 is 0 whatever its deltas hold, and
                so is their gradient.
        """
        _check(self, ("pred_bboxes", pred_bboxes), ("bboxes", bboxes), 4, weight)
        boxes = coding.delta_decode(
            pred_bboxes,
            bboxes.expand(pred_bboxes.shape),
            weight=weight,
            means=self.means,
            stds=self.stds,
            limit=abs(math.log(wh_ratio_clip)),
            max_shift=float(self.ctr_clamp) if self.add_ctr_clamp else 0.0,
        )
        return _clipped(boxes, max_shape if self.clip_border else None)

    decode_export = decode


class DistancePointBBoxCoder:
    """Distances from a point to the sides l, t, r, b of its box (FCOS; Tian et al., 2019).

    Args:
        clip_border: whether `decode` clips boxes at `max_shape`.
        encode_size: length of the code; 4.
    """

    def __init__(self, clip_border: bool = True, encode_size: int = 4) -> None:
        self.clip_border = clip_border
        self.encode_size = encode_size

    def encode(
        self, points: Tensor, gt_bboxes: Tensor, max_dis: float | None = None, eps: float = 0.1
    ) -> Tensor:
        """Distances (..., 4) from points (..., 2) to boxes (..., 4), within [0, max_dis - eps]."""
        _check(self, ("gt_bboxes", gt_bboxes), ("points", points), 2)
        distances = ltrb(points[..., :2], gt_bboxes)
        return distances if max_dis is None else distances.clamp(0, max_dis - eps)

    def term(self) -> tuple[str, tuple[float, ...]]:
        """The op that decodes, without an image to clip at, and its constants."""
        return "distances", ()

    @fused
    def decode(
        self,
        points: Tensor,
        pred_bboxes: Tensor,
        max_shape: MaxShape = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Boxes (..., 4) xyxy from points (..., 2) and distances (..., 4), clipped at max_shape.

        A box of weight (...,) 0 is 0 whatever its distances hold, and so is their gradient.
        """
        _check(self, ("pred_bboxes", pred_bboxes), ("points", points), 2, weight)
        point = points[..., :2].expand(*pred_bboxes.shape[:-1], 2)
        boxes = coding.distance_decode(pred_bboxes, point, weight=weight)
        return _clipped(boxes, max_shape if self.clip_border else None)

    decode_export = decode
