"""The processes that `torchrun` started, of which each trains on its share of every batch."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the others, if there are any; yields the device of this process.

    Whatever holds the group, as DDP does, has to be gone at the end: if it were the last to let go
    of a gloo group, it would wait for threads that wait for the interpreter.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cpu":
        # Left unnamed it is the accelerator's, where there is one, and knows no tensors of a CPU.
        dist.init_process_group("gloo")
    else:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(device_id=device)
    yield device
    # Not after an error: the others may be waiting in a collective, and `torchrun` ends them.
    dist.destroy_process_group()
    atexit.register(leave)


def leave() -> NoReturn:
    """End this process with success, without tearing the interpreter down.

    Where there was a DDP, torch keeps gloo's threads beyond the group, and one of them aborts the
    interpreter's end now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def are_several() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """0 is the process that draws, writes and prints."""
    return dist.get_rank() if are_several() else 0


def count() -> int:
    return dist.get_world_size() if are_several() else 1


def share() -> slice:
    """This process's part of a batch that all of them have drawn."""
    return slice(rank(), None, count())


def mean(values: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if are_several():
        dist.all_reduce(values)
        values /= count()
    return values
