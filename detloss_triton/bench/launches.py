"""What a step (forward, `sum_losses`, backward) launches on a GPU, counted without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_triton import backend, sum_losses

from .batches import BUILDERS
from .trees import leaves

# Operations that make a view or allocate, and start nothing on a GPU.
FREE = (
    "view", "expand", "slice", "select", "squeeze", "permute", "transpose", "detach", "alias",
    "as_strided", "split", "unbind", "empty", "narrow", "reshape", "unflatten", "lift_fresh",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts operations of torch that write tensors of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        name = str(function).removeprefix("aten.")
        is_free = any(word in name for word in FREE)
        if isinstance(first, Tensor) and first.is_meta and not is_free:
            self.found[name] += 1
        return out


def launches(name: str, **sizes: Any) -> tuple[int, Counter[str]]:
    """(launches of our kernels, operations of torch) of a criterion's step on meta tensors.

    Args:
        sizes: of the batch, see `BUILDERS`; a step takes as many whatever they are.
    """
    meta = torch.device("meta")
    batch = BUILDERS[name](**sizes).on(meta)
    criterion = batch.criterion(meta)
    wanted = [x for _, x in leaves(batch.inputs) if x.requires_grad]
    with backend.record_launches() as launched, Operations() as operations:
        loss = sum_losses(criterion(**batch.inputs))
        torch.autograd.grad(loss, wanted)
    return len(launched), operations.found


def launches_per_step(names: Iterable[str]) -> dict[str, int]:
    """Launches of each criterion's step, ours and torch's; of none where there is no Triton."""
    if backend.versions()["triton"] is None:
        return {}
    counted = {name: launches(name) for name in names}
    return {name: ours + sum(torchs.values()) for name, (ours, torchs) in counted.items()}
