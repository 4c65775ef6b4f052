"""YOLOv9, from raw maps to losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detloss_triton.assigners.assignment import Given
from detloss_triton.criteria import YOLOv9Criterion
from detloss_triton.ops.regression import Rules
from detloss_triton.targets import pack, pad_targets
from detloss_triton.vec2box import Level, Vec2Box

from .whole import WholeLoss


class YOLOv9Loss(WholeLoss):
    """`YOLOv9Criterion`, which matches for itself, on anchors that follow the maps' sizes.

    Args:
        num_classes: number of object classes C.
        strides: of each level, in pixels.
        criterion: a `YOLOv9Criterion`, whose `vec2box` is updated for maps of another size.
        rules: "otx" or "yolo", of the criterion where none is given.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32),
        criterion: Any = None,
        *,
        rules: Rules = "otx",
    ) -> None:
        super().__init__()
        if criterion is None:
            side = max(strides)
            criterion = YOLOv9Criterion(
                num_classes, Vec2Box(None, (side, side), strides), rules=rules
            )
        self.num_classes = num_classes
        self.criterion = criterion

    def forward(
        self,
        main_preds: Sequence[Level],
        targets: Given,
        aux_preds: Sequence[Level] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of both heads, as of `YOLOv9Criterion`; also of a batch without a box.

        Shapes:
            main_preds, aux_preds: of each level (classes (B, C, h, w) logits, distributions
                (B, bins, 4, h, w) logits, distances to the sides in strides (B, 4, h, w)).
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        self._follow(main_preds)
        like = self.criterion.vec2box.anchor_grid.new_empty(0, dtype=torch.float32)
        rows = pad_targets(pack(targets, type(self).__name__, like))
        losses: dict[str, Tensor] = self.criterion(main_preds, rows, aux_preds)
        return losses

    if TYPE_CHECKING:
        __call__ = forward

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward`, with targets in shapes that repeat."""
        self._follow(arguments["main_preds"])
        if isinstance(self.criterion, YOLOv9Criterion):
            self.criterion.follow_vec2box()
        return super().repeatable(arguments)

    def _follow(self, main_preds: Sequence[Level]) -> None:
        """Have the anchors of the maps' sizes."""
        try:
            maps = [distances for _, _, distances in main_preds]
            sizes = [(x.shape[2], x.shape[3]) for x in maps]
        except (AttributeError, IndexError, TypeError, ValueError):
            return  # The criterion says what is wrong.
        vec2box = self.criterion.vec2box
        device = maps[0].device if maps else vec2box.anchor_grid.device
        if maps and (vec2box.map_sizes != sizes or vec2box.anchor_grid.device != device):
            stride = vec2box.strides[0]
            vec2box.update((sizes[0][0] * stride, sizes[0][1] * stride), device)
