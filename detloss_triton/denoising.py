"""Contrastive denoising: queries made of spoilt true boxes, which need no matching to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import cxcywh_to_xyxy
from .shapes import check_counts, check_numbers


@dataclass(frozen=True)
class Denoising:
    """Queries in groups of T positives and then T negatives, T the most boxes of an image.

    Shapes:
        labels: (B, groups * 2 T) int64, the number of classes where an image has fewer boxes.
        boxes: (B, groups * 2 T, 4) normalised cxcywh, 0 there.
        positives: per image (groups * n,) int64, the queries that belong to its boxes.
    """

    labels: Tensor
    boxes: Tensor
    positives: list[Tensor]
    groups: int

    @property
    def meta(self) -> dict[str, Any]:
        """The entry "dn_meta" of the outputs."""
        return {"dn_positive_idx": self.positives, "dn_num_group": self.groups}

    def blocked(self, n_queries: int) -> Tensor:
        """(N, N) bool, True where a query may not attend to another; N counts `n_queries` more.

        A group sees itself and the other queries; these must not see the answers in any group.
        """
        n_denoising = self.labels.shape[1]
        group = torch.arange(n_denoising, device=self.labels.device) // (n_denoising // self.groups)
        group = torch.cat([group, group.new_full((n_queries,), self.groups)])
        return (group[:, None] != group[None]) & (group[None] != self.groups)


def denoising_queries(
    targets: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    positives: int = 100,
    wrong_labels: float = 0.25,
    box_noise: float = 1.0,
) -> Denoising | None:
    """Spoil the true boxes of a batch; None if it has none.

    Contrastive denoising (Zhang et al., 2022, https://arxiv.org/abs/2203.03605): a positive's
    corners move by less than `box_noise` halves of the box's size, a negative's by one to two
    times that. The one is to find its way back, the other to learn that it is background.

    Args:
        num_classes: number of object classes C; label C is that of no box.
        positives: about how many an image has: the fewer boxes, the more groups.
        wrong_labels: part of the labels that are drawn anew, from all classes.

    Shapes:
        targets: per image {"boxes": (n, 4) normalised cxcywh, "labels": (n,)}, see
            `normalised_targets`.

    Raises:
        TypeError, ValueError: for counts that are not positive, or noise that is no number.
    """
    place = "denoising_queries"
    check_counts(place, 1, num_classes=num_classes, positives=positives)
    check_numbers(place, wrong_labels=wrong_labels, box_noise=box_noise)
    longest = max((len(target["labels"]) for target in targets), default=0)
    if longest == 0:
        return None
    groups = max(1, positives // longest)
    labels = pad_sequence([t["labels"] for t in targets], True, num_classes).repeat(1, 2 * groups)
    boxes = pad_sequence([t["boxes"] for t in targets], True).repeat(1, 2 * groups, 1)
    index = torch.arange(labels.shape[1], device=labels.device)
    negative = index // longest % 2

    wrong = torch.rand(labels.shape, device=labels.device) < wrong_labels
    other = torch.randint(num_classes, labels.shape, device=labels.device)
    labels = torch.where(wrong & (labels < num_classes), other, labels)

    moves = (torch.rand_like(boxes) + negative[:, None]) * torch.rand_like(boxes).sub(0.5).sign()
    corners = cxcywh_to_xyxy(boxes) + moves * boxes[..., 2:].repeat(1, 1, 2) * (box_noise / 2)
    low, high = corners.clamp(0, 1).chunk(2, -1)
    # A negative's corners may have changed places.
    boxes = torch.cat([(low + high) / 2, (high - low).abs()], -1)

    first = index[:: 2 * longest, None]
    of_images = [(first + index[: len(t["labels"])]).flatten() for t in targets]
    return Denoising(labels, boxes, of_images, groups)
