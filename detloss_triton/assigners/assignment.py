"""What an assigner is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from detloss_triton.shapes import check_numbers, check_shapes
from detloss_triton.targets import Targets

# As they are packed once per step, or as torchvision has them: boxes xyxy in pixels.
Given: TypeAlias = "Targets | Sequence[Mapping[str, Tensor]]"


class Assignment(NamedTuple):
    """What each anchor of B images is to learn.

    Shapes:
        target: (B, A) int64 index of the anchor's target among those of its image, -1 for none.
        label: (B, A) int64, that target's, -1 for none.
        metric: (B, A) IoU of the target with the anchor, or with its prediction where the assigner
            looks at predictions; 0 for none.
        box: (B, A, 4) that target's, xyxy in pixels; 0 for none.
        ignored: (B, A) bool, anchors without a target that are no background either; None from an
            assigner that has no such.
    """

    target: Tensor
    label: Tensor
    metric: Tensor
    box: Tensor
    ignored: Tensor | None = None


def check_anchors(place: str, anchors: Tensor, n: int | str, inside: Tensor | None) -> None:
    """Raise ValueError unless anchors are (n, 4), and what says which of them are inside (n,)."""
    flags = {} if inside is None else {"inside": (inside, (n,))}
    check_shapes(place, anchors=(anchors, (n, 4)), **flags)


def check_weights(place: str, /, **arguments: float) -> None:
    """Raise TypeError unless every argument is a number, ValueError if it is negative."""
    check_numbers(place, **arguments)
    for name, value in arguments.items():
        if value < 0:
            raise ValueError(f"{place}: {name} must not be negative, got {value}")
