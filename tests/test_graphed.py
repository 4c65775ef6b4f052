"""A criterion in graphs: keys, copies, upstream gradients, eviction, staleness and errors.

Where there is no GPU, a stand-in for recording runs the function again, on the tensors it was
recorded with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CPU, NAMES, Case, assert_same, case
from machine import INTERPRETED
from test_detr import EXTRAS, Inputs, criterion_of
from torch import Tensor
from trees import Unchanged, leaves

import detloss_triton as dt
from detloss_triton import graphs, signature
from detloss_triton.graphs import graphed

over_criteria = pytest.mark.parametrize("name", NAMES)


class Again:
    """What is recorded runs again, and what it returns is copied to where it was."""

    def __init__(self) -> None:
        self.recorded = 0

    def rehearse(self, function: Callable[[], Any]) -> None:
        function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with_gradients = torch.is_grad_enabled()
        results = [None if x is None else x.clone() for x in function()]

        def replay() -> None:
            with torch.set_grad_enabled(with_gradients):
                again = function()
            for held, found in zip(results, again, strict=True):
                assert (held is None) == (found is None)
                if held is not None:
                    held.copy_(found)

        return results, replay


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Iterator[Again]:
    """CPU tensors are recorded, without anybody who looks at their values."""
    stand_in = Again()
    monkeypatch.setattr(graphs, "recorder_of", lambda device: stand_in)
    monkeypatch.setattr(signature, "is_cpu", lambda device: False)
    monkeypatch.setattr("detloss_triton.criteria.yolox.check_count", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "graphed")
        yield stand_in


def weighted(losses: Any, seed: int = 0) -> Tensor:
    """A sum of the losses with factors that are not round."""
    terms = [x for _, x in leaves(losses)]
    factors = torch.rand(len(terms), generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.stack([f * x.sum() for f, x in zip(factors, terms, strict=True)]).sum()


def step(criterion: Any, batch: Case, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({path: loss}, {path: gradient}) with an upstream gradient of each loss."""
    losses = criterion(**batch.inputs)
    wanted = batch.leaves()
    gradients = torch.autograd.grad(
        weighted(losses, seed), list(wanted.values()), materialize_grads=True
    )
    return dict(leaves(losses)), dict(zip(wanted, gradients, strict=True))


def repeatable(batch: Case) -> Case:
    """Padded as for a graph: more rows that weigh nothing are added up in another order."""
    make = getattr(batch.criterion, "repeatable", dict)
    return Case(batch.criterion, make(batch.inputs))


def assert_equal(criterion: Any, batch: Case, seed: int = 0) -> None:
    """Bit by bit as the criterion without graphs."""
    theirs = step(batch.criterion, repeatable(batch.on(CPU)), seed)
    with Unchanged(batch.inputs):
        ours = step(criterion, batch, seed)
    for found, expected in zip(ours, theirs, strict=True):
        assert_same(found, expected, 0)


def recorded(criterion: Any) -> list[Any]:
    return criterion.graphs()  # type: ignore[no-any-return]


@over_criteria
def test_eager_numbers_with_any_upstream_gradient(name: str, backend: str, again: Again) -> None:
    if backend == "triton" and INTERPRETED and name in ("yolov9", "detr", "dfine"):
        pytest.skip("takes the interpreter a minute, and graphs know no backend")
    criterion = graphed(case(name).criterion)
    for seed in (0, 1, 2, 4):
        assert_equal(criterion, case(name, seed=seed), seed)
    (graph,) = recorded(criterion)
    assert graph.replays >= 2
    assert graph.bytes > 0
    assert "float32 (" in graph.signature
    assert again.recorded == 2


def with_denoising(name: str, counts: tuple[int, ...], seed: int) -> Case:
    """As `case`, with as many denoising queries whatever the counts, and targets as lists."""
    if name not in ("detr", "dfine"):
        return case(name, counts, seed)
    inputs, criterion = Inputs([*counts], CPU, torch.float32, seed=seed), criterion_of(name)
    meta, _ = inputs.meta()
    inputs.meta = lambda: (meta, 2 * 60 * 2)  # type: ignore[method-assign]
    outputs = getattr(inputs, name)(*EXTRAS)
    return Case(criterion, {"outputs": outputs, "targets": inputs.targets})


@over_criteria
def test_few_graphs_over_random_box_counts(name: str, again: Again) -> None:
    """40 steps with 0 to 60 boxes an image, one without any, targets as they come."""
    generator = torch.Generator().manual_seed(0)
    criterion = graphed(case(name).criterion)
    with dt.use_backend("torch"):
        for seed in range(40):
            counts = torch.randint(0, 61, (3,), generator=generator) * (seed != 20)
            batch = with_denoising(name, tuple(counts.tolist()), seed)
            if seed % 4 == 3:
                assert_equal(criterion, batch, seed)
            else:
                criterion(**batch.inputs)
    assert again.recorded <= 2 * 3
    assert sum(graph.replays for graph in recorded(criterion)) >= 30
