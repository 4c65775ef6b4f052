"""What the ranks of a distributed training share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

# What a rehearsal would have sent.
_unsent: list[Tensor] | None = None


def are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks of each entry of x, which is used up; on one process x as it is."""
    if not are_several():
        return x
    if _unsent is None:
        dist.all_reduce(x)
    else:
        _unsent.append(x)
    return x / dist.get_world_size()


@contextmanager
def rehearsal() -> Iterator[list[Tensor]]:
    """Send nothing, as the other ranks may not rehearse; what would have been sent is collected."""
    global _unsent
    before, _unsent = _unsent, []
    try:
        yield _unsent
    finally:
        _unsent = before


def why_not_recorded() -> str:
    """Why a collective cannot be part of a graph of launches; empty if it can."""
    backends = str(dist.get_backend_config())
    return "" if "nccl" in backends else f"the process group ({backends}) sends from the host"
