"""Measurement: time, memory, launches and host reads of a step, on a CPU or a GPU.

Clocks, power and governor stay as they are found.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]

WARM_UP = 3
MIB = 2**20
# A copy for the bandwidth: well past every cache, small beside the memory of any machine.
COPY_BYTES = {"cpu": 256 * MIB, "gpu": 1024 * MIB}
# Rotating inputs fill the second-level cache this many times, so that none is still there.
CACHES = 3
MOST_COPIES = 64
# What starts work on the GPU, by the names that its profiler gives to the driver's calls.
LAUNCHES = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
    "hipLaunchKernel",
    "hipExtModuleLaunchKernel",
    "hipModuleLaunchKernel",
    "hipMemcpyAsync",
    "hipMemcpyWithStream",
    "hipMemsetAsync",
)
_aten = torch.ops.aten
# What makes the host wait for a device: `.item()`, `nonzero`, boolean indexing, `unique`.
READS = frozenset(
    {
        _aten._local_scalar_dense.default,
        _aten.nonzero.default,
        _aten.is_nonzero.default,
        _aten.equal.default,
        _aten.masked_select.default,
        _aten._unique2.default,
    }
)


def reads_host(function: Any, args: Sequence[Any]) -> bool:
    """Whether a dispatched operation makes the host wait for values on a device."""
    if function is _aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return any(i is not None and i.dtype in masks for i in args[1])
    # The host's solver of assignments waits for the costs.
    return function in READS or function.namespace == "detloss_triton"


class CountReads(TorchDispatchMode):
    """Counts operations that would wait for a device, on any device.

    Fewer than there are: `.cpu()` and `.numpy()` of a CPU tensor pass unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += reads_host(function, args)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Spread:
    """Times in milliseconds: how many, their median and quantiles."""

    rounds: int
    median: float
    p10: float
    p25: float
    p75: float
    p90: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        if len(times) == 1:
            return cls(1, *[times[0]] * 5)
        cuts = statistics.quantiles(times, n=20, method="inclusive")
        p10, p25, p75, p90 = (cuts[i] for i in (1, 4, 14, 17))
        return cls(len(times), statistics.median(times), p10, p25, p75, p90)


class Clock:
    """Times steps on a CPU."""

    device_name = "cpu"
    # Steps in a turn. On a GPU several, since one alone would find an idle queue.
    turn = 1

    def time(self, step: Step, n: int) -> list[float]:
        """Milliseconds of each of n steps, one after the other."""
        times = []
        for _ in range(n):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def synchronize(self) -> None:
        pass

    def copies(self, n_bytes: int) -> int:
        """How many sets of inputs of that size to rotate, so that none is found in a cache."""
        return 1

    def peak_mib(self, step: Step) -> float | None:
        """Memory that one step needs on top of what is held before it; None where unknown."""
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        step()
        gc.collect()
        # What the allocator keeps for later would hide what the step takes from it.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
        reset.write_text("5")
        before = _status("VmRSS")
        result = step()
        peak = _status("VmHWM") - before
        del result
        return max(peak, 0.0)

    def launches(self, step: Step) -> int | None:
        return None

    def reads(self, step: Step) -> int | None:
        with CountReads() as counter:
            step()
        return counter.count


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class GpuClock(Clock):
    """Times steps on a GPU by events; `module` is torch.cuda or its like."""

    turn = 5

    def __init__(self, device: torch.device, module: Any) -> None:
        self.device, self.module = device, module
        self.device_name = module.get_device_name(device)

    def time(self, step: Step, n: int) -> list[float]:
        pairs = []
        for _ in range(n):
            start, end = (self.module.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def synchronize(self) -> None:
        self.module.synchronize(self.device)

    def copies(self, n_bytes: int) -> int:
        properties = self.module.get_device_properties(self.device)
        cache = getattr(properties, "L2_cache_size", 0) or 64 * MIB
        return min(1 + CACHES * cache // max(n_bytes, 1), MOST_COPIES)

    def peak_mib(self, step: Step) -> float | None:
        self.synchronize()
        before = self.module.memory_allocated(self.device)
        self.module.reset_peak_memory_stats(self.device)
        result = step()
        self.synchronize()
        peak = self.module.max_memory_allocated(self.device) - before
        del result
        return float(peak) / MIB

    def launches(self, step: Step) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as profiler:
            step()
            self.synchronize()
        return sum(event.name.startswith(LAUNCHES) for event in profiler.events())

    def reads(self, step: Step) -> int | None:
        if not hasattr(self.module, "set_sync_debug_mode"):
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.module.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                self.module.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def clock_of(device: torch.device) -> Clock:
    if device.type == "cpu":
        return Clock()
    return GpuClock(device, torch.get_device_module(device))


def copy_bandwidth(device: torch.device, clock: Clock, rounds: int = 9) -> float:
    """GB/s of a large copy on this machine, counting what it reads and what it writes."""
    n_bytes = COPY_BYTES["cpu" if device.type == "cpu" else "gpu"]
    source = torch.rand(n_bytes // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    clock.time(copy, WARM_UP)
    return 2 * n_bytes / Spread.of(clock.time(copy, rounds)).median / 1e6


def n_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: a broadcast dimension has one element."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def counted_bytes(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], leaves: Sequence[Tensor], backward: bool
) -> int:
    """The least a step can move: forward reads inputs and writes outputs once; backward reads the
    inputs once more and writes the gradients."""
    forward = sum(map(n_bytes, inputs)) + sum(map(n_bytes, outputs))
    return forward + (sum(map(n_bytes, inputs)) + sum(map(n_bytes, leaves)) if backward else 0)


@dataclass(frozen=True)
class Budget:
    """How long to time one step: at least `rounds` rounds, then until `seconds` are over."""

    rounds: int
    seconds: float
    most: int = 100


def alternate(steps: dict[str, Step], clock: Clock, budget: Budget) -> dict[str, Spread]:
    """Times of several steps that take turns, so that what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        clock.time(step, WARM_UP)
    start = time.perf_counter()
    rounds = 0
    while rounds < budget.rounds or (
        rounds < budget.most and time.perf_counter() - start < budget.seconds * len(steps)
    ):
        for name, step in steps.items():
            times[name] += clock.time(step, clock.turn)
        rounds += 1
    return {name: Spread.of(values) for name, values in times.items()}
