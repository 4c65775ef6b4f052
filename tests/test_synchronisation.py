"""A step of any criterion stays on its device: nothing is read back, nothing is sent there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import NAMES, Case, assert_same, case
from machine import needs_gpu, needs_triton
from synchronisation import NoHostReads, Transfers
from torch import Tensor
from trees import leaves

import detloss_triton as dt
from detloss_triton.backend import record_launches

META = torch.device("meta")
over_criteria = pytest.mark.parametrize("name", NAMES)


def with_norms_on(device: torch.device, batch: Case) -> Case:
    """The case with normalisers that a head would compute on the device."""
    inputs = dict(batch.inputs)
    if "avg_factor" in inputs:
        inputs["avg_factor"] = torch.tensor(float(inputs["avg_factor"]), device=device)
    return Case(batch.criterion, inputs)


@over_criteria
def test_the_torch_backend_transfers_what_its_solver_needs(name: str) -> None:
    batch = with_norms_on(META, case(name).on(META))
    with dt.use_backend("torch"), Transfers() as transfers:
        batch.step()
    assert transfers.to_device == 0
    assert transfers.by_solver == (name in ("detr", "dfine"))


@needs_triton
@over_criteria
def test_the_triton_backend_transfers_nothing(name: str) -> None:
    """With launches recorded instead of run, as there need not be a GPU."""
    batch = with_norms_on(META, case(name).on(META))
    with record_launches() as launches, Transfers() as transfers:
        batch.step()
    assert launches
    assert (transfers.to_device, transfers.by_solver) == (0, 0)


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_class_weights_and_numbers_are_not_copied_at_every_step(use_sigmoid: bool) -> None:
    loss = dt.CrossEntropyLoss(use_sigmoid, class_weight=[1.0, 2.0, 3.0]).to(META)
    logits = torch.zeros(5, 3, device=META, requires_grad=True)
    batch = case("detr").on(META)
    with dt.use_backend("torch"), Transfers() as transfers:
        loss(logits, torch.zeros(5, dtype=torch.int64, device=META)).backward()
        batch.criterion(**batch.inputs, num_boxes=7)
    assert transfers.to_device == 0


def test_transfers_are_seen() -> None:
    x = torch.zeros(3, device=META)
    with Transfers() as transfers:
        torch.tensor([1.0, 2.0, 3.0], device=META) + x
        x + torch.ones(3).to(META)
        x + torch.ones(())
        x.new_tensor([1.0, 2.0, 3.0])
    assert transfers.to_device == 4
    for wait in (x.sum().item, x.cpu, x.nonzero, x.tolist, lambda: x[x > 1]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@over_criteria
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0)], ids=str)
def test_nothing_waits_for_the_device(
    name: str, counts: tuple[int, ...], backend: str, device: torch.device
) -> None:
    batch = with_norms_on(device, case(name, counts).on(device))
    if device.type == "cuda":  # compiling a kernel may wait, once
        batch.step()
    with NoHostReads(device) as reads:
        batch.step()
    assert reads.by_solver == (backend == "torch" and name in ("detr", "dfine"))


def test_the_detector_of_synchronisations_works(device: torch.device) -> None:
    x = torch.arange(3.0, device=device)
    waiting: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: bool(x[0] > 0),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x.clone().masked_select(x > 1),
        lambda: x.unique(),
    ]
    for wait in waiting:
        with (
            pytest.raises((AssertionError, RuntimeError)),
            NoHostReads(device),
        ):
            wait()


@needs_gpu
@over_criteria
def test_a_captured_step_replays_with_new_data(name: str) -> None:
    """Forward, matching and backward in one CUDA graph, bitwise as eager."""
    cuda = torch.device("cuda")
    first, second = (with_norms_on(cuda, case(name, seed=seed).on(cuda)) for seed in (0, 1))
    if shapes(first.inputs) != shapes(second.inputs):
        second = first  # where the number of positives is a shape, which a graph cannot change
    expected = [
        (dict(losses), dict(gradients)) for losses, gradients in (first.step(), second.step())
    ]
    static = Case(first.criterion, first.on(cuda).inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            static.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradients = static.step()
    for batch, (theirs, their_gradients) in zip((first, second), expected, strict=True):
        copy_into(static.inputs, batch.inputs)
        graph.replay()
        assert_same(losses, theirs, 0)
        assert_same(gradients, their_gradients, 0)


def shapes(tree: Any) -> list[tuple[str, torch.Size]]:
    return [(path, x.shape) for path, x in leaves(tree)]


@torch.no_grad()
def copy_into(tree: Any, other: Any) -> None:
    sources: dict[str, Tensor] = dict(leaves(other))
    for path, x in leaves(tree):
        x.copy_(sources[path])
