"""Proof that a step waits for nothing on the device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detloss_triton import backend
from detloss_triton.bench.measure import READS

SOLVER = torch.ops.detloss_triton.linear_sum_assignment.default


class NoHostReads(TorchDispatchMode):
    """Raises where the host would read the device; on a GPU, CUDA's own sync check runs as well.

    A CPU stands in for another device: what is looked at only because the host is the device
    (`backend.is_cpu`) is left out, and the path of any other device taken.
    The torch backend's solver on the host is counted, and may wait once for each of its two copies.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.by_solver = 0
        self.elsewhere = pytest.MonkeyPatch()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in READS, f"the host reads the device: {function}"
        if function is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing with a mask reads the device"
        if function is SOLVER:
            self.by_solver += 1
            return self._solved(*args)
        return function(*args, **(kwargs or {}))

    def _solved(self, *args: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return SOLVER(*args)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = SOLVER(*args)
        torch.cuda.set_sync_debug_mode("error")
        waits = [w for w in caught if "called a synchronizing" in str(w.message)]
        assert len(waits) <= 2, f"{len(waits)} waits to copy once each way"
        return out

    def __enter__(self) -> Any:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        self.elsewhere.setattr(backend, "is_cpu", lambda device: False)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self.elsewhere.undo()
        super().__exit__(*exception)


class Transfers(TorchDispatchMode):
    """Counts copies between host and device, with tensors on `meta` in the place of a device's.

    What reads a meta tensor (`.item()`, `.cpu()`, `nonzero`, a mask as index) raises by itself;
    what brings tensors or numbers from the host passes through here. The solver on the host, one
    copy each way, is an operator that `meta` knows by its shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_device = 0
        self.by_solver = 0
        self.literals = _Literals(self)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.by_solver += function is SOLVER
        if isinstance(out, torch.Tensor) and out.is_meta:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.to_device += any(not x.is_meta for x in tensors)
        return out

    def __enter__(self) -> Any:
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.literals.__exit__(*exception)


class _Literals(TorchFunctionMode):
    """Counts tensors made of Python numbers, which `meta`, having no data, does not copy."""

    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self.transfers = transfers

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.is_meta:
            self.transfers.to_device += not isinstance(args[-1], torch.Tensor)
        return out
