"""Ragged targets as padded tensors, and which target each denoising query has. No gradients.

Rows of all images are concatenated; where each image's begin, the numbers of rows say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.engine import Sample, direct

# Images whose rows a program counts at a time, places of targets that it fills, queries that it
# looks up, and the positives that it compares these with at a time.
_IMAGES, _PLACES, _QUERIES, _POSITIVES = 128, 128, 64, 32


def padded_index(counts: Tensor, width: int) -> Tensor:
    """(R, width) positions of ragged rows in their concatenation behind a filler; 0 is padding."""
    count = counts.clamp(0, width).unsqueeze(1)
    column = torch.arange(1, width + 1, device=counts.device)
    return (column + count.cumsum(0) - count).masked_fill(column > count, 0)


def padded(rows: Sequence[Tensor], index: Tensor, filler: float) -> Tensor:
    """The concatenation of rows behind one of filler, at `index`; filler beyond the last."""
    first = rows[0].new_full((1, *rows[0].shape[1:]), filler)
    behind = torch.cat([first, *rows])
    return behind[index.masked_fill(index >= len(behind), 0)]


def _ragged_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_rows = min(rows, 150)
    for counts in ([n_rows, 0, 3], [0, 0], [1]):
        labels = [torch.randint(0, 9, (n,), generator=generator) for n in counts]
        boxes = [torch.rand(n, 4, generator=generator) for n in counts]
        params = {"n_targets": max(counts) + 2}
        yield Sample((torch.tensor(counts), tuple(labels), tuple(boxes)), params)


@direct(samples=_ragged_samples)
def pad(
    counts: Tensor, labels: tuple[Tensor, ...], boxes: tuple[Tensor, ...], n_targets: int
) -> tuple[Tensor, Tensor]:
    """Labels (B, T), -1 beyond an image's count, and boxes (B, T, 4), 0 beyond.

    Shapes:
        counts: (B,), up to T = n_targets. labels: (n,) int64 each, and boxes: (n, 4), of the
            images in their order; those without boxes may be left out, but for one.
    """
    index = padded_index(counts, n_targets)
    return padded(labels, index, -1), padded(boxes, index, 0)


@pad.triton
def _(given: Any) -> tuple[Tensor, Tensor]:
    all_labels, all_boxes = torch.cat(tuple(given.labels)), torch.cat(tuple(given.boxes))
    shape = (len(given.counts), given.n_targets)
    out = all_labels.new_empty(shape), all_boxes.new_empty((*shape, 4))
    n_blocks = -(-given.n_targets // _PLACES)
    if out[0].numel() > 0:
        backend.launch(
            kernels.packing.pad_kernel,
            (len(given.counts) * n_blocks,),
            given.counts.device,
            p_counts=given.counts.contiguous(),
            p_labels=all_labels,
            p_boxes=all_boxes,
            p_padded_labels=out[0],
            p_padded_boxes=out[1],
            n_targets=given.n_targets,
            n_boxes=len(all_labels),
            n_blocks=n_blocks,
            BI=_IMAGES,
            BT=_PLACES,
        )
    return out


def _denoising_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def queries(n: int) -> Tensor:
        # Each once, and some beyond those there are.
        return torch.randperm(rows + 4, generator=generator)[:n] - 2

    n = min(rows // 2, 60)
    params = {"n_groups": 2, "n_targets": n + 2, "n_queries": rows}
    counts = [n, 0, n // 2]
    ragged = tuple(queries(2 * count) for count in counts)
    yield Sample((ragged, torch.tensor(counts)), {"n_images": 3, **params})
    whole = torch.full((2, 2 * (n + 2)), -1)
    whole[:, : 2 * n] = torch.stack([queries(2 * n) for _ in range(2)])
    yield Sample(((whole.view(2, 2, n + 2),), None), {"n_images": 2, **params})


@direct(samples=_denoising_samples)
def denoising_map(
    positives: tuple[Tensor, ...],
    counts: Tensor | None,
    n_images: int,
    n_groups: int,
    n_targets: int,
    n_queries: int,
) -> Tensor:
    """(1, B, Q) target of each denoising query, -1 for none.

    Shapes:
        positives: the query of each target of an image in each of its groups, integers; one that is
            no query is of none. (groups * n,) each, in the order of images, of which those without
            boxes may be left out, but for one; or one (B, groups, T), and no counts.
        counts: (B,) numbers of targets n, up to T = n_targets; None if each image has T.
    """
    shape = (n_images, n_groups, n_targets)
    if counts is None:
        queries = torch.cat([x.reshape(-1) for x in positives]).view(shape)
    else:
        index = padded_index(counts.repeat_interleave(n_groups), n_targets)
        queries = padded(positives, index, -1).view(shape)
    target = torch.arange(n_targets, device=queries.device).expand(shape)
    out = target.new_full((n_images, n_queries + 1), -1)
    is_query = (queries >= 0) & (queries < n_queries)
    index = queries.masked_fill(~is_query, n_queries).long()
    return out.scatter(1, index.flatten(1), target.flatten(1))[:, :n_queries].unsqueeze(0)


@denoising_map.triton
def _(given: Any) -> Tensor:
    rows = given.positives[0] if len(given.positives) == 1 else torch.cat(tuple(given.positives))
    out = rows.new_empty((1, given.n_images, given.n_queries), dtype=torch.int64)
    n_blocks = -(-given.n_queries // _QUERIES)
    if out.numel() > 0:
        backend.launch(
            kernels.packing.denoising_kernel,
            (given.n_images * n_blocks,),
            rows.device,
            p_positives=rows.contiguous(),
            p_counts=None if given.counts is None else given.counts.contiguous(),
            p_target=out,
            n_positives=rows.numel(),
            n_groups=given.n_groups,
            n_targets=given.n_targets,
            n_queries=given.n_queries,
            n_blocks=n_blocks,
            BI=_IMAGES,
            BQ=_QUERIES,
            BP=_POSITIVES,
        )
    return out
