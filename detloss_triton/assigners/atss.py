"""The assigner that sets each target a threshold of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from detloss_triton.anchors import Anchors
from detloss_triton.ops.atss import assign_atss
from detloss_triton.shapes import check_counts
from detloss_triton.targets import pack

from .assignment import Assignment, Given, check_anchors


@dataclass(frozen=True)
class ATSSAssigner:
    """Adaptive training sample selection (Zhang et al., 2020, https://arxiv.org/abs/1912.02424).

    Candidates of a target are, of each level, the `topk` anchors whose centres are nearest to its
    own. It gets those whose IoU is at least the mean plus the standard deviation of its
    candidates', and whose centres lie inside it by more than 0.01 pixels. An anchor that several
    targets would get goes to the one of largest IoU. Of equals the first is taken.

    Raises:
        TypeError, ValueError: for a `topk` that is no integer, or not positive.
    """

    topk: int

    def __post_init__(self) -> None:
        check_counts(type(self).__name__, 1, topk=self.topk)

    def __call__(
        self, anchors: Anchors, targets: Given, inside: Tensor | None = None
    ) -> Assignment:
        """Assign the targets of every image.

        Args:
            anchors: of all images, see `anchors.grid_anchors`.
            inside: (A,) which anchors may be candidates, see `anchors.inside`, the others being
                ignored; None for all.

        Shapes:
            targets: per image {"boxes": (n, 4) xyxy in pixels, "labels": (n,)}, or `Targets` of
                such boxes; one of a negative label gets no anchor.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on several devices.
        """
        name = type(self).__name__
        boxes, sizes = anchors
        check_anchors(name, boxes, sum(sizes), inside)
        packed = pack(targets, name, boxes)
        target, label, metric, box = assign_atss(
            boxes, inside, *packed, sizes=tuple(sizes), topk=int(self.topk)
        )
        ignored = None if inside is None else ~inside.expand_as(target)
        return Assignment(target, label, metric, box, ignored)
