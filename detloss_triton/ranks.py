"""What the ranks of a distributed training share."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks of each entry of x, which is used up; on one process x as it is."""
    if not are_several():
        return x
    dist.all_reduce(x)
    return x / dist.get_world_size()
