"""The seven criteria under torch.compile: no graph break, few compiles, the same numbers.

`fullgraph=True` raises at a break of the forward; its backward is a graph of its own, or a fault.
Graphs are run as they were traced (`aot_eager`) where Inductor is not the question.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CPU, NAMES, assert_same, case
from machine import TESTS, environment, needs_gpu, needs_triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from trees import mixed

from detloss_triton import use_backend
from detloss_triton.bench.batches import DENSE

over_criteria = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_compiles(name: str, chosen: Any, device: torch.device, **how: Any) -> None:
    batch = case(name).on(device)
    compiled = torch.compile(batch.criterion, fullgraph=True, **how)
    with use_backend(chosen):
        losses, gradients = batch.step()
        for _ in range(3):  # "reduce-overhead" warms up, captures, and replays
            ours, our_gradients = batch.step(compiled)
    assert_same(ours, losses, 1e-5)
    assert_same(our_gradients, gradients, 1e-4)


@over_criteria
def test_one_graph_and_the_same_numbers(name: str) -> None:
    assert_compiles(name, "torch", CPU, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssd", "rtmdet"])
def test_inductor_on_a_cpu(name: str) -> None:
    assert_compiles(name, "torch", CPU)


@needs_gpu
@over_criteria
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_a_gpu(name: str, mode: str) -> None:
    assert_compiles(name, "triton", torch.device("cuda"), mode=mode)


@pytest.mark.parametrize("name", ["atss", "rtmdet", "ssd", "yolox"])
def test_nothing_runs_along_the_anchors_of_a_gpu(name: str) -> None:
    """Inductor is asked for no scan and no sort: of a cumsum over SSD's real (16, 8732) its code
    for a GPU fails with torch 2.11. Tensors on `meta` take a GPU's path, and nothing runs."""
    meta = torch.device("meta")
    batch = DENSE[name](**({"images": 16, "anchors": 8732} if name == "ssd" else {})).on(meta)
    operators: set[str] = set()

    def listed(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    listing = aot_autograd(fw_compiler=listed, decompositions=select_decomp_table)
    with use_backend("torch"):
        torch.compile(batch.make(), fullgraph=True, backend=listing)(**batch.inputs)
    scans = re.compile("cum|sort|scan|topk|kthvalue|unique|searchsorted|bucketize")
    assert len(operators) > 10
    assert not [operator for operator in operators if scans.search(operator)]


@pytest.mark.slow
@needs_triton
def test_kernels_are_part_of_the_graph() -> None:
    """Triton's kernels traced without a GPU, in a process that has its compiler."""
    run = subprocess.run(
        [sys.executable, TESTS / "trace_kernels.py"],
        env=environment(TRITON_INTERPRET=None),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(NAMES)


@pytest.mark.parametrize("name", ["ssd", "yolox", "yolov9", "detr", "dfine"])
def test_few_compiles_over_random_box_counts(name: str) -> None:
    """40 steps with 0 to 60 boxes an image, one without any: at most 3 compiles after the first."""
    generator = torch.Generator().manual_seed(0)
    compiled = torch.compile(case(name).criterion, fullgraph=True, backend="eager")
    n_graphs = []
    with use_backend("torch"):
        for step in range(40):
            counts = torch.randint(0, 61, (3,), generator=generator) * (step != 20)
            batch = case(name, tuple(counts.tolist()), seed=step)
            mixed(compiled(**batch.inputs)).backward()
            n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[0] == 1
    assert n_graphs[-1] <= 4, n_graphs
