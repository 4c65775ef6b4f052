"""Which target each query has: a map from queries to targets, -1 where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detloss_triton.targets import Targets, counts_of
from detloss_triton.validate import may_read

Indices = Sequence[tuple[Tensor, Tensor]]


def map_of_indices(
    found: Any, n_queries: int, targets: Targets, counts: Sequence[int] | None, place: str
) -> Tensor:
    """(1, B, Q) target of each query, from one pair (query indices, target indices) per image.

    Pairs that lie on a CPU are looked at. Of others, one out of range is none, and of several of a
    query one counts, unless values are checked.

    Args:
        found: the pairs, or as other projects' matchers return them, {"indices": the pairs}.
        counts: boxes in each image, where the host knows.

    Raises:
        TypeError, ValueError: for what holds no such pairs.
    """
    pairs = found.get("indices") if isinstance(found, Mapping) else found
    n_images = len(targets.labels)
    if not isinstance(pairs, (list, tuple)) or len(pairs) != n_images:
        came = f"{len(pairs)} of them" if isinstance(pairs, (list, tuple)) else type(pairs).__name__
        raise ValueError(
            f"{place}: indices must be a list of pairs (query indices, target indices), or "
            f"{{'indices': the list}}, one for each of {n_images} images, got {came}"
        )
    if counts is None and (may_read(targets.counts.device)):
        counts = counts_of(targets)
    out = targets.labels.new_full((n_images, n_queries + 1), -1, dtype=torch.int64)
    for image, pair in enumerate(pairs):
        at = f"{place}, image {image}: indices"
        if not isinstance(pair, (list, tuple, Tensor)) or len(pair) != 2:
            raise ValueError(f"{at} must be a pair (query indices, target indices)")
        queries, chosen = (_as_indices(index, at) for index in pair)
        if queries.shape != chosen.shape:
            raise ValueError(
                f"{at} must be of as many queries as targets, got {len(queries)} and {len(chosen)}"
            )
        if may_read(queries.device):
            _check_range(f"{at} of queries", queries, n_queries)
            if counts is not None:
                _check_range(f"{at} of targets", chosen, counts[image])
            if len(queries.unique()) < len(queries):
                raise ValueError(f"{at} must have each query once, got {queries.tolist()}")
        queries, chosen = queries.to(out.device), chosen.to(out.device)
        is_pair = (queries >= 0) & (queries < n_queries)
        is_pair &= (chosen >= 0) & (chosen < targets.counts[image])
        # What is no pair is written to one more column, which is cut off.
        out[image].scatter_(0, queries.masked_fill(~is_pair, n_queries), chosen)
    return out[:, :n_queries].unsqueeze(0)


def _check_range(place: str, index: Tensor, n: int) -> None:
    wrong = (index < 0) | (index >= n)
    if wrong.any():
        raise ValueError(f"{place} must be in [0, {n}), got {index[wrong][0].item()}")


def _as_indices(index: Any, place: str) -> Tensor:
    if not isinstance(index, (list, tuple)) and not hasattr(index, "__array__"):
        raise TypeError(f"{place} must be two tensors, got {type(index).__name__}")
    index = torch.as_tensor(index)
    no_integers = index.is_floating_point() or index.dtype == torch.bool
    if index.dim() != 1 or (no_integers and index.numel()):
        raise ValueError(
            f"{place} must be two tensors of integers (n,), got {index.dtype} {tuple(index.shape)}"
        )
    return index.to(torch.int64)
