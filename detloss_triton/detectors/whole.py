"""What whole losses share: maps of levels as rows of anchors, and targets packed once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.anchors import Size
from detloss_triton.assigners.assignment import Given
from detloss_triton.criteria.levels import as_rows, check_levels
from detloss_triton.shapes import check_shapes
from detloss_triton.targets import Targets, pack, with_room

Maps = Sequence[Tensor]


class WholeLoss(nn.Module):
    """A criterion with all that stands before it."""

    def prepare(self, targets: Given) -> Targets:
        """The targets as `forward` packs them: call it outside a compiled region."""
        return pack(targets, type(self).__name__)

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward`, with targets in shapes that repeat."""
        return {**arguments, "targets": with_room(self.prepare(arguments["targets"]))}


class PriorLoss(WholeLoss, ABC):
    """A whole loss with points or anchors, which depend on the sizes of its maps."""

    @abstractmethod
    def priors(self, sizes: Sequence[Size], device: torch.device) -> Any:
        """What boxes are decoded from and assigned to, of maps of these (height, width)."""

    @abstractmethod
    def decoded(self, codes: Tensor, priors: Any) -> Tensor:
        """Boxes (N, A, 4) xyxy in pixels that rows of `bbox_pred` (N, A, 4) stand for."""

    def decode(self, bbox_pred: Maps) -> Tensor:
        """Boxes (N, A, 4) xyxy in pixels that a head's maps stand for, not clipped to the image."""
        sizes = map_sizes(self, bbox_pred=bbox_pred)
        priors = self.priors(sizes, bbox_pred[0].device)
        return self.decoded(self.rows("bbox_pred", bbox_pred, 4), priors)

    def rows(self, name: str, maps: Maps, features: int) -> Tensor:
        """Maps (N, k * features, H, W) of all levels as rows (N, A, features), as priors lie."""
        return joined(self, name, maps, features)

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward`: targets in shapes that repeat, and priors, which live on."""
        priors = arguments.get("priors")
        if priors is None:
            maps = arguments["cls_score"]
            priors = self.priors([(x.shape[2], x.shape[3]) for x in maps], maps[0].device)
        return {**super().repeatable(arguments), "priors": priors}


def map_sizes(loss: nn.Module, /, **maps: Maps) -> list[Size]:
    """(H, W) of every level.

    Raises:
        TypeError, ValueError: unless all are lists of as many maps (N, channels, H, W), a level's
            of one size.
    """
    check_levels(loss, **maps)
    for i, level in enumerate(zip(*maps.values(), strict=True)):
        named = zip(maps, level, strict=True)
        shapes = {name: (x, ("N", f"channels of {name}", "H", "W")) for name, x in named}
        check_shapes(f"{type(loss).__name__}, level {i}", **shapes)
    return [(x.shape[2], x.shape[3]) for x in next(iter(maps.values()))]


def joined(loss: nn.Module, name: str, maps: Maps, features: int) -> Tensor:
    """Maps (N, k * features, H, W) of all levels as rows (N, A, features), those of a position
    together.

    Where k is 1 throughout that is one copy, in which a row's features lie A apart.

    Raises:
        ValueError: for another number of channels.
    """
    check_channels(loss, name, maps, features)
    if all(level.shape[1] == features for level in maps):
        return torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
    return torch.cat([as_rows(level, features) for level in maps], 1)


def check_channels(loss: nn.Module, name: str, maps: Maps, features: int) -> None:
    """Raise ValueError unless maps have so many channels for each of a position's anchors."""
    for i, level in enumerate(maps):
        if level.shape[1] % features:
            raise ValueError(
                f"{type(loss).__name__}, level {i}: {name} must have shape (N, k * {features}, "
                f"H, W), got {tuple(level.shape)}"
            )
