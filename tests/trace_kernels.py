"""Trace each criterion on the Triton backend, forward and backward, and say how many kernels.

Run by test_compile.py, as a program of its own: Dynamo traces kernels for a compiler, not those of
the interpreter. There need not be a GPU, since nothing runs; what looks for one is told that there
is. A graph break is an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._triton
import triton
from cases import NAMES, Case, case
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from detloss_triton import backend, use_backend


class NoGPU:
    """A driver that only answers what it would compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def counting(counts: dict[str, int], direction: str) -> Callable[..., Any]:
    """A compiler that counts a graph's kernels; what it returns gives zeros."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        counts[direction] = sum("detloss_triton" in str(n.target) for n in graph.graph.nodes)
        (output,) = graph.graph.find_nodes(op="output")
        values = [None if node is None else node.meta["val"] for node in output.args[0]]

        def zeros(_: list[Any]) -> list[Any]:
            return [
                torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
                for v in values
            ]

        zeros._boxed_call = True  # type: ignore[attr-defined]
        return zeros

    return compiler


def main() -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NoGPU())
    torch.utils._triton.has_triton = lambda: True
    backend._INTERPRETED = True  # CPU tensors will do
    for name in NAMES:
        torch._dynamo.reset()
        counts: dict[str, int] = {}
        compilers = {f"{d}_compiler": counting(counts, d) for d in ("fw", "bw")}
        batch = case(name)
        if name in ("atss", "rtmdet"):  # one level: the others add time and nothing to break
            one = {k: v[:1] if isinstance(v, list) else v for k, v in batch.inputs.items()}
            batch = Case(batch.criterion, one)
        with use_backend("triton"):
            batch.step(
                torch.compile(batch.criterion, fullgraph=True, backend=aot_autograd(**compilers))
            )
        assert counts["fw"] > 0 and counts["bw"] > 0, counts
        print(name, counts["fw"], counts["bw"], flush=True)


main()
