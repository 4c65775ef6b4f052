"""Denoising queries: the target that each is made from, and so is to find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detloss_triton.once import once
from detloss_triton.ops.packing import denoising_map, padded, padded_index
from detloss_triton.shapes import check_counts, check_mapping, check_shapes
from detloss_triton.targets import Targets, counts_of, pack


@dataclass(frozen=True)
class Positives:
    """The denoising query of each target in each group: all in one tensor, or image by image.

    Shapes:
        rows: one (B, groups, T), -1 for none; or with counts (groups * n,) of each image, of which
            those without boxes may be left out, but for one.
        counts: (B,), on the device.
    """

    rows: tuple[Tensor, ...]
    counts: Tensor | None
    n_images: int
    groups: int
    n_targets: int

    def padded(self) -> Tensor:
        """(B, groups, T) query of each target in each group, -1 for none."""
        if self.counts is None:
            return self.rows[0]
        index = padded_index(self.counts.repeat_interleave(self.groups), self.n_targets)
        return padded(self.rows, index, -1).view(self.n_images, self.groups, self.n_targets)

    def map(self, n_queries: int) -> Tensor:
        """(1, B, Q) target of each query, -1 for none."""
        out: Tensor = denoising_map(
            self.rows,
            self.counts,
            n_images=self.n_images,
            n_groups=self.groups,
            n_targets=self.n_targets,
            n_queries=n_queries,
        )
        return out


def prepared(dn_meta: Mapping[str, Any], positives: Positives) -> dict[str, Any]:
    """dn_meta with the positives as one tensor, of a shape that repeats."""
    entries = {"dn_positive_idx": positives.padded(), "dn_num_group": positives.groups}
    return {**dn_meta, **entries}


def positives_of(
    dn_meta: Mapping[str, Any],
    packed: Targets,
    targets: Targets | Sequence[Mapping[str, Tensor]],
    place: str,
) -> Positives:
    """The denoising queries in dn_meta, checked.

    Args:
        targets: what was packed; a list knows how many boxes each image has.
        place: what an error begins with.

    Raises:
        TypeError, ValueError: for a missing entry, or positives that are not one per box and group.
    """
    device, (n_images, n_targets) = packed.labels.device, packed.labels.shape
    counts = None if isinstance(targets, Targets) else counts_of(targets)
    positives, groups = _entries(dn_meta, place)
    sizes = {"n_images": n_images, "groups": groups, "n_targets": n_targets}
    if isinstance(positives, Tensor) and (positives.dim() != 2 or counts is None):
        _check_indices(f"{place}: dn_positive_idx", positives, device)
        check_shapes(
            f"{place}, dn_meta",
            labels=(packed.labels, ("B", "T")),
            dn_positive_idx=(positives, ("B", groups, "T")),
        )
        return Positives((positives,), None, **sizes)
    positives = _by_image(positives, n_images, device, place)
    known = packed.counts
    if counts is None:
        # Of packed targets the host knows no more than how many there may be.
        counts = [min(row.numel() // max(groups, 1), n_targets) for row in positives]
        known = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    _check_numbers(positives, counts, groups, place)
    rows = [row.to(torch.int64) for row in positives if row.numel()]
    if not rows:
        rows = [torch.empty(0, dtype=torch.int64, device=device)]
    return Positives(tuple(rows), known, **sizes)


def matched_indices(
    dn_meta: Mapping[str, Any],
    targets: Targets | Sequence[Mapping[str, Tensor]],
    place: str,
) -> list[tuple[Tensor, Tensor]]:
    """The given pairs of denoising queries: per image (query indices, target indices).

    Of `Targets`, the numbers of boxes are read from the device.

    Raises:
        TypeError, ValueError: as `positives_of`, and `pack` for targets.
    """
    device = pack(targets, place).labels.device
    counts = counts_of(targets)
    positives, groups = _entries(dn_meta, place)
    if isinstance(positives, Tensor) and positives.dim() == 3:
        check_shapes(place, dn_positive_idx=(positives, (len(counts), groups, "T")))
        positives = [x[:, :n].flatten() for x, n in zip(positives, counts, strict=True)]
    positives = _by_image(positives, len(counts), device, place)
    _check_numbers(positives, counts, groups, place)
    return [
        (positive.flatten(), torch.arange(n, device=device).repeat(groups))
        for positive, n in zip(positives, counts, strict=True)
    ]


def _entries(dn_meta: Any, place: str) -> tuple[Any, int]:
    """(queries, number of groups): the two entries that are read."""
    check_mapping(place, dn_meta=dn_meta)
    for key in ("dn_positive_idx", "dn_num_group"):
        if dn_meta.get(key) is None:
            raise ValueError(f"{place}: dn_meta must have {key!r}, got {list(dn_meta)}")
    groups = dn_meta["dn_num_group"]
    if isinstance(groups, Tensor) and groups.numel() == 1:
        groups = groups.item()
    check_counts(f"{place}, dn_meta", 0, dn_num_group=groups)
    return dn_meta["dn_positive_idx"], groups


def _by_image(positives: Any, n_images: int, device: torch.device, place: str) -> Sequence[Tensor]:
    """The rows of what must hold a tensor of indices for each image."""
    if not isinstance(positives, (list, tuple, Tensor)):
        raise TypeError(
            f"{place}: dn_positive_idx must be a list of tensors, one per image, "
            f"got {type(positives).__name__}"
        )
    is_number = isinstance(positives, Tensor) and positives.dim() == 0
    rows: Sequence[Any] = [positives] if is_number else list(positives)
    _check_rows(rows, n_images, device, place)
    return rows


@once()
def _check_rows(rows: Sequence[Any], n_images: int, device: torch.device, place: str) -> None:
    """Raise ValueError unless they are the indices of queries of each image."""
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in rows]
    if len(rows) != n_images or not all(map(_is_row, rows)):
        raise ValueError(
            f"{place}: dn_positive_idx must have a tensor (n * groups,) for each of {n_images} "
            f"images, got {shapes}"
        )
    for image, row in enumerate(rows):
        _check_indices(f"{place}: dn_positive_idx[{image}]", row, device)


def _is_row(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dim() == 1 or x.numel() == 0)


def _check_indices(place: str, indices: Tensor, device: torch.device) -> None:
    """Raise ValueError unless they are integers there; what holds nothing may be anything."""
    if indices.numel() == 0:
        return
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{place} must hold the indices of queries, got {indices.dtype}")
    if indices.device != device:
        raise ValueError(f"{place} must be on {device}, got {indices.device}")


@once()
def _check_numbers(
    positives: Sequence[Tensor], counts: Sequence[int], groups: int, place: str
) -> None:
    """Raise ValueError unless every image has one denoising positive per box and group."""
    for image, (positive, count) in enumerate(zip(positives, counts, strict=True)):
        if positive.numel() != count * groups:
            raise ValueError(
                f"{place}: dn_positive_idx[{image}] must have {count} boxes x {groups} groups = "
                f"{count * groups} entries, got {positive.numel()}"
            )
