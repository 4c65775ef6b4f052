"""Proof that a step waits for nothing on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_triton.bench.measure import READS


class NoHostReads(TorchDispatchMode):
    """Raises where the host would read the device; on a GPU, CUDA's own sync check runs as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in READS, f"the host reads the device: {function}"
        if function is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing with a mask reads the device"
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*exception)
