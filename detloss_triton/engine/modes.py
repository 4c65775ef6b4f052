"""How a step is being run: as it is written, traced by a compiler, or transformed by `torch.func`.

The only file that asks whether code is being compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detloss_triton import backend


def is_compiling() -> bool:
    """Whether `torch.compile` traces what runs: there are no values, and no memory, to look at."""
    return torch.compiler.is_compiling()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether `torch.func` transforms what runs, or a tensor is a batch that torch hides.

    A transform has to see every operation on tensors, so ops are then their torch references.
    """
    if is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or any(
        # The batches of `torch.autograd.grad(..., is_grads_batched=True)`.
        functorch.is_legacy_batchedtensor(x)
        for x in tensors
    )


def host_sees(device: torch.device) -> bool:
    """Whether values there may be looked at without waiting: on a CPU, in an eager step."""
    return backend.is_cpu(device) and not is_compiling() and not is_transformed()
