"""Graphs of what a function launches on a device, which share one pool of memory.

What one graph leaves of the pool, another may use: so they run one after the other, also where
they are replayed on several streams.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from .backend import graph_class

_Result = TypeVar("_Result")


class Recorder(Protocol):
    """Runs functions in a way that lets them be repeated without their Python code."""

    def rehearse(self, function: Callable[[], Any]) -> None:
        """Run a function until nothing is left to be compiled; raise if it waits for a device.

        A recording that fails may leave the device's generator of random numbers unusable.
        """

    def record(self, function: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        """(tensors, replay): what a function returns, which `replay` computes anew in place."""


def recorder_of(device: torch.device) -> Recorder | None:
    """None where nothing can be recorded, as on a CPU, and while somebody else records there."""
    if graph_class(device) is None:
        return None
    is_recording = getattr(torch.get_device_module(device), "is_current_stream_capturing", bool)
    return None if is_recording() else _GraphRecorder.of(device)


class _GraphRecorder:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device)
        self.stream = self.module.Stream(device)
        self.last = self.module.current_stream(device)
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.options: dict[str, Any] = {"stream": self.stream}
        if "capture_error_mode" in inspect.signature(self.module.graph).parameters:
            # Threads that load data are free to allocate what they like meanwhile.
            self.options["capture_error_mode"] = "thread_local"

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> _GraphRecorder:
        return _GraphRecorder(device)

    def rehearse(self, function: Callable[[], Any]) -> None:
        with self.module.device(self.device):
            current = self.module.current_stream()
            self.stream.wait_stream(current)
            with self.module.stream(self.stream):
                function()  # which compiles, and may wait for it
                with self._refusing_waits():
                    function()
            current.wait_stream(self.stream)

    def record(self, function: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        if not self.graphs:
            # A pool that no graph uses any more is gone.
            self.pool = self.module.graph_pool_handle()
        graph = graph_class(self.device)()
        try:
            with (
                self.module.device(self.device),
                self.module.graph(graph, pool=self.pool, **self.options),
            ):
                result = function()
        except BaseException:
            self.graphs.clear()  # torch believes that the pool is still being recorded to
            raise
        self.graphs.add(graph)
        return result, functools.partial(self._replay, graph)

    def _replay(self, graph: Any) -> None:
        stream = self.module.current_stream(self.device)
        if stream != self.last:
            stream.wait_stream(self.last)
            self.last = stream
        graph.replay()

    @contextmanager
    def _refusing_waits(self) -> Iterator[None]:
        if not hasattr(self.module, "set_sync_debug_mode"):
            yield
            return
        before = self.module.get_sync_debug_mode()
        self.module.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.module.set_sync_debug_mode(before)
