"""A criterion in graphs: keys, copies, upstream gradients, eviction, staleness and errors.

Where there is no GPU, a stand-in for recording runs the function again, on the tensors it was
recorded with.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import json
import pickle
import runpy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import CPU, NAMES, Case, assert_same, case
from machine import INTERPRETED, TESTS, needs_gpu
from test_detr import EXTRAS, Inputs, criterion_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trees import Unchanged, leaves
from whole_cases import NAMES as WHOLE
from whole_cases import batch as whole_batch
from whole_cases import loss_of

import detloss_triton as dt
from detloss_triton import cli, graphs, ranks, recorder, signature
from detloss_triton.bench.batches import BUILDERS
from detloss_triton.graphs import graphed

over_criteria = pytest.mark.parametrize("name", NAMES)


class Again:
    """What is recorded runs again, and what it returns is copied to where it was."""

    def __init__(self) -> None:
        self.recorded = 0
        # A recording computes nothing: what is sent to other ranks, or written here, is not.
        self.unsent: Callable[[], Any] = nullcontext
        self.keeps = torch.zeros(())

    def rehearse(self, function: Callable[[], Any]) -> None:
        function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with_gradients, kept = torch.is_grad_enabled(), self.keeps.clone()
        with self.unsent():
            results = [None if x is None else x.clone() for x in function()]
        self.keeps.copy_(kept)

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
    dtype = next(iter(batch.leaves().values())).dtype
    theirs = step(batch.criterion, repeatable(batch.on(CPU, dtype)), seed)
    with Unchanged(batch.inputs):
        ours = step(criterion, batch, seed)
    for found, expected in zip(ours, theirs, strict=True):
        assert_same(found, expected, 0)


@over_criteria
def test_more_rows_weigh_nothing(name: str, again: Again) -> None:
    batch = case(name, (3, 0, 9))
    found, expected = (step(batch.criterion, x) for x in (repeatable(batch), batch))
    assert_same(found[0], expected[0], 1e-6)
    assert_same(found[1], expected[1], 1e-5)


def recorded(criterion: Any) -> list[Any]:
    return criterion.graphs()  # type: ignore[no-any-return]


@over_criteria
def test_eager_numbers_with_any_upstream_gradient(name: str, backend: str, again: Again) -> None:
    if backend == "triton" and INTERPRETED and name in ("yolov9", "detr", "dfine"):
        pytest.skip("takes the interpreter a minute, and graphs know no backend")
    criterion = graphed(case(name).criterion)
    for seed in (0, 1, 2, 4):
        assert_equal(criterion, case(name, seed=seed), seed)
    found = recorded(criterion)
    assert again.recorded == 2 * len(found)
    assert sum(graph.replays for graph in found) >= 2
    assert all(graph.bytes > 0 and "float32 (" in graph.signature for graph in found)


def test_yolov9_by_other_rules(again: Again) -> None:
    """Also of targets without rows, which have losses then, and a graph with the others'."""
    criterion = BUILDERS["yolov9"](rules="yolo").criterion("cpu")
    recorded_with = graphed(criterion)
    for seed, n in enumerate((4, 2, 0, 3, 0)):
        batch = BUILDERS["yolov9"](seed, targets=max(n, 1), rules="yolo").on(CPU)
        rows = batch.inputs["targets"][:, :n]
        given = Case(criterion, {**batch.inputs, "targets": rows})
        assert_equal(recorded_with, given, seed)
    assert again.recorded == 2 and len(recorded(recorded_with)) == 1


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


@pytest.mark.parametrize("name", WHOLE)
def test_whole_losses(name: str, again: Again) -> None:
    """Boxes as they come, in lists; assigned anew in each step."""
    criterion = graphed(loss_of(name))
    with dt.use_backend("torch"):
        for seed, counts in enumerate(((3, 6), (0, 8), (0, 0), (5, 1))):
            case = whole_batch(name, counts, seed)
            case.inputs["targets"] = dt.targets.unpack(case.inputs["targets"])
            assert_equal(criterion, case, seed)
    assert again.recorded == 2
    assert sum(graph.replays for graph in recorded(criterion)) == 3


@pytest.mark.parametrize("name", WHOLE)
def test_images_of_sizes_that_alternate(name: str, again: Again) -> None:
    """Each size has its graphs, whose anchors stay where they are."""
    criterion = graphed(loss_of(name))
    with dt.use_backend("torch"):
        for seed in range(8):
            assert_equal(criterion, whole_batch(name, (2, 3), seed, 64 + 64 * (seed % 2)), seed)
    assert again.recorded == 4
    assert [graph.replays for graph in recorded(criterion)] == [3, 3]


def trained(name: str = "rtmdet", n: int = 3, **options: Any) -> tuple[Any, list[Case]]:
    """A criterion that has a graph for the batches, of which it has seen two."""
    batches = [case(name, seed=seed) for seed in range(n)]
    criterion = graphed(batches[0].criterion, **options)
    for batch in batches[:2]:
        criterion(**batch.inputs)
    return criterion, batches


@over_criteria
def test_half_precision_and_autocast(name: str, again: Again) -> None:
    criterion = graphed(case(name).criterion)
    for seed in (0, 1, 2):
        batch = case(name, seed=seed).on(CPU, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(criterion, batch)
    assert again.recorded >= 2
    before = again.recorded
    assert_equal(criterion, batch)  # without autocast
    assert_equal(criterion, batch)
    assert again.recorded == before + 2


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("atss", "avg_factor"),
        ("ssd", "avg_factor"),
        ("yolox", "num_total_samples"),
        ("detr", "num_boxes"),
        ("dfine", "num_boxes"),
    ],
)
def test_numbers_are_inputs(name: str, argument: str, again: Again) -> None:
    """Of any type, above 0; others are the criterion's to judge."""
    criterion = graphed(case(name).criterion)
    for number in (3, 3.0, 7, 11.5, np.float32(5), np.int64(4)):
        batch = case(name)
        batch.inputs[argument] = number
        assert_equal(criterion, batch)
    assert again.recorded == 2
    batch.inputs[argument] = "3"
    with pytest.raises(TypeError, match=argument):
        criterion(**batch.inputs)


def test_numbers_out_of_range_are_refused_as_ever(again: Again) -> None:
    criterion, (batch, *_) = trained("detr")
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="num_boxes must be finite and above 0"):
            criterion(**batch.inputs, num_boxes=wrong)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_lists_and_packed_targets_are_one_signature(name: str, again: Again) -> None:
    lists = [with_denoising(name, counts, seed=3) for counts in ((2, 0, 3), (1, 5, 0), (7, 1, 1))]
    criterion = graphed(lists[0].criterion)
    for batch in lists:
        assert_equal(criterion, batch)
        assert_equal(criterion, repeatable(batch))
    assert len(recorded(criterion)) == 1


def test_another_reduction(again: Again) -> None:
    """Modules that are called one by one: means, and losses of every row."""
    for seed in range(3):
        batch = case("yolox", seed=seed)
        for slot in ("loss_cls", "loss_bbox", "loss_obj"):
            getattr(batch.criterion, slot).reduction = "mean"
        criterion = graphed(batch.criterion) if seed == 0 else criterion  # noqa: F821
        assert_equal(criterion, batch)
    assert again.recorded == 2


def test_losses_without_an_upstream_gradient(again: Again) -> None:
    criterion, batches = trained("detr")
    wanted = [*batches[2].leaves().values()]
    ours, theirs = (
        torch.autograd.grad(
            c(**batches[2].inputs)["loss_giou_aux_0"] * 3, wanted, materialize_grads=True
        )
        for c in (criterion, batches[2].criterion)
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


def test_what_is_handed_out_stays_as_it_was(again: Again) -> None:
    """Gradients that autograd keeps as they come, and losses that are modified in place."""
    criterion, batches = trained()
    (batch,) = batches[2:]
    losses = criterion(**batch.inputs)
    weighted(losses).backward()
    kept = [x.grad for x in batch.leaves().values()]
    copies = [x.clone() for x in (*kept, *dict(leaves(losses)).values())]
    other = case("rtmdet", seed=5)
    weighted(criterion(**other.inputs)).backward()
    for x, before in zip((*kept, *dict(leaves(losses)).values()), copies, strict=True):
        assert torch.equal(x, before)
    losses["loss_cls"][0] *= 2
    assert torch.equal(losses["loss_cls"][0], 2 * copies[len(kept)])
    assert torch.equal(losses["loss_cls"][1], copies[len(kept) + 1])
    again_in_place = criterion(**other.inputs)
    again_in_place["loss_cls"][0].mul_(2)
    weighted(again_in_place).backward()


def test_parameters_behind_the_predictions(again: Again) -> None:
    """Through views and shared tensors, over two accumulated steps."""
    grads = []
    plain = case("rtmdet").criterion
    for criterion in (plain, graphed(plain)):
        weight = torch.linspace(0.5, 1.5, 5).view(1, 5, 1, 1).requires_grad_()
        for seed in range(4):
            inputs = case("rtmdet", seed=seed).inputs
            inputs["cls_score"] = [weight * x for x in inputs["cls_score"]]
            weighted(criterion(**inputs), seed).backward()
        grads.append(weight.grad)
    assert grads[0] is not None
    assert torch.equal(*grads)
    assert again.recorded == 2


def test_a_second_backward_and_one_too_late(again: Again) -> None:
    criterion, (first, second, third) = trained()
    loss = weighted(criterion(**third.inputs))
    wanted = [*third.leaves().values()]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    with_others = torch.autograd.grad(loss * 2, wanted, retain_graph=True)
    expected = step(third.criterion, third.on(CPU))[1].values()
    for x, twice, theirs in zip(once, with_others, expected, strict=True):
        assert torch.equal(x, theirs)
        assert torch.equal(twice, 2 * theirs)
    criterion(**first.inputs)
    criterion(**second.inputs)
    with pytest.raises(RuntimeError, match=r"after 2 later call.*before the next.*slots=N"):
        torch.autograd.grad(loss, wanted)


def test_slots_keep_calls_in_flight(again: Again) -> None:
    criterion, batches = trained(n=4, slots=2)
    totals = [weighted(criterion(**batch.inputs)) for batch in batches[2:]]
    for batch, loss in zip(batches[2:], totals, strict=True):
        expected = step(batch.criterion, batch.on(CPU))[1].values()
        found = torch.autograd.grad(loss, [*batch.leaves().values()], retain_graph=True)
        assert all(map(torch.equal, found, expected))
    criterion(**batches[0].inputs)
    with pytest.raises(RuntimeError, match="later call"):
        totals[0].backward()
    totals[1].backward()
    assert len(recorded(criterion)) == 2


def test_gradients_of_gradients_are_refused_by_name(again: Again) -> None:
    criterion, (*_, batch) = trained()
    loss = weighted(criterion(**batch.inputs))
    with pytest.raises(RuntimeError, match="graphed RTMDetCriterion: gradients of gradients"):
        torch.autograd.grad(loss, [*batch.leaves().values()], create_graph=True)


def test_without_gradients(again: Again) -> None:
    criterion, (*_, batch) = trained()
    for _ in range(2):
        with torch.no_grad():
            losses = dict(leaves(criterion(**batch.inputs)))
    assert not any(x.requires_grad for x in losses.values())
    assert_same(losses, dict(leaves(batch.criterion(**batch.inputs))), 0)
    with torch.inference_mode():
        assert dict(leaves(criterion(**batch.inputs)))["loss_cls.0"].is_inference()
    assert again.recorded == 4


def sized(images: int, seed: int = 0) -> Case:
    batch = BUILDERS["rtmdet"](seed, images=images).on(CPU)
    return Case(batch.make(), batch.inputs)


def test_graphs_not_used_for_longest_go(again: Again) -> None:
    criterion = graphed(sized(1).criterion, max_graphs=2)
    for images in (1, 1, 2, 2, 1, 3, 3, 1, 1):
        assert_equal(criterion, sized(images, images))
    assert again.recorded == 2 * 3
    assert [x.replays for x in recorded(criterion)] == [1, 4]
    assert_equal(criterion, sized(2))
    assert again.recorded == 2 * 3, "a signature that was dropped is new"


def test_a_graph_that_was_dropped_still_goes_backward(again: Again) -> None:
    criterion = graphed(sized(1).criterion, max_graphs=1)
    batch = sized(1)
    criterion(**batch.inputs)
    loss = weighted(criterion(**batch.inputs))
    for _ in range(2):
        criterion(**sized(2).inputs)
    (graph,) = recorded(criterion)
    assert "(2, 5, 8, 8)" in graph.signature
    found = torch.autograd.grad(loss, [*batch.leaves().values()])
    assert all(map(torch.equal, found, step(batch.criterion, batch)[1].values()))


def test_tensors_that_stay_in_place_are_not_copied(again: Again) -> None:
    static = sized(2)
    criterion = graphed(static.criterion)
    criterion(**static.inputs)
    for seed in range(4):
        with torch.no_grad():
            for x, new in zip(tensors(static), tensors(sized(2, seed)), strict=True):
                x.copy_(new)
        assert_equal(criterion, static)
    (graph,) = recorded(criterion)
    n_bytes = sum(4 * x.numel() for x in static.leaves().values())
    assert graph.bytes == n_bytes + 4 * 6, "gradients and losses"
    assert again.recorded == 2
    for seed in range(3):
        before = [x.clone() for x in tensors(static)]
        assert_equal(criterion, sized(2, seed))
        assert all(map(torch.equal, tensors(static), before)), "the user's memory is not written to"
    assert again.recorded == 4
    (graph,) = recorded(criterion)
    assert graph.bytes > 2 * n_bytes


def tensors(batch: Case) -> list[Tensor]:
    return [x for _, x in leaves(batch.inputs)]


def test_a_step_copies_in_few_launches(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU sees it: copies in by type, losses out, upstream in, gradients out."""
    criterion, (*_, batch) = trained("atss")
    (graph,) = next(iter(vars(criterion)["_graphs_of_calls"].known.values())).graphs
    graph.replay = graph.replay_backward = lambda: None
    operators: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operators.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Listed():
        losses = dict(leaves(criterion(**batch.inputs)))
    assert operators == ["_foreach_copy_", "_foreach_copy_", "fill_", "_foreach_mul"]
    operators.clear()
    upstream = [torch.ones(())] * len(losses)
    with Listed():
        torch.autograd.grad([*losses.values()], [*batch.leaves().values()], upstream)
    assert operators == ["_foreach_copy_", "_foreach_mul"]


def edits() -> dict[str, Callable[[Any], Any]]:
    return {
        "a number": lambda c: setattr(c, "alpha", 0.3),
        "an entry of a table": lambda c: c.weight_dict.update(loss_giou=3.0),
        "another table": lambda c: setattr(c, "weight_dict", {**c.weight_dict, "loss_bbox": 1.0}),
        "a part's number": lambda c: setattr(c.matcher, "cost_class", 0.5),
        "a tensor": lambda c: c.weight_dict.update(loss_vfl=torch.tensor(2.0)),
    }


@pytest.mark.parametrize("edit", edits())
def test_settings_may_change(edit: str, again: Again) -> None:
    criterion, (*_, batch) = trained("detr")
    assert_equal(criterion, batch)
    edits()[edit](criterion)
    edits()[edit](batch.criterion)
    for _ in range(3):
        assert_equal(criterion, batch)
    assert again.recorded == 4


def test_modes_have_graphs_of_their_own(again: Again) -> None:
    criterion, (*_, batch) = trained()
    for change in (criterion.eval, lambda: dt.use_backend("torch"), criterion.double):
        with dt.use_backend("auto"):
            change()
            for _ in range(2):
                criterion(**batch.inputs)
        criterion.train()
    assert again.recorded == 2 * 3, "these modules have nothing that double() would change"


def test_a_tensor_in_the_settings_is_read_anew(again: Again) -> None:
    criterion, (*_, batch) = trained("detr")
    weight = torch.tensor(2.0)
    for c in (criterion, batch.criterion):
        c.weight_dict["loss_vfl"] = weight
    for value in (2.0, 3.0, 4.0, 5.0):
        weight.fill_(value)
        assert_equal(criterion, batch)
    assert again.recorded == 4


class Learned(nn.Module):
    """A stranger's: a loss with a factor that it learns, and a count of its calls."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.seen += 1
        return {"loss": [(x * x).sum() * self.factor * scale], "seen": self.seen.clone(), "n": 3}


def test_a_strangers_criterion_learns_and_counts(again: Again) -> None:
    plain = Learned()
    criterion = graphed(copy.deepcopy(plain))
    again.keeps = criterion.seen
    for i in range(4):
        x = torch.arange(4.0) + i
        gradients = []
        for c in (plain, criterion):
            leaf = x.clone().requires_grad_()
            losses = c(leaf, scale=2.0 + i)
            assert losses["n"] == 3
            assert losses["seen"] == i + 1
            assert not losses["seen"].requires_grad
            gradients.append(torch.autograd.grad(losses["loss"][0], [leaf, c.factor]))
        assert all(map(torch.equal, *gradients))
    assert again.recorded == 2
    assert criterion.state_dict()["seen"] == 4


class Counting(Learned):
    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, scale)


class Switching(Learned):
    """Changes while it is rehearsed."""

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.on = not getattr(self, "on", True)
        return super().forward(x, scale)


def test_a_criterion_that_changes_itself_runs_as_it_is(again: Again) -> None:
    criterion = graphed(Counting())
    for _ in range(4):
        criterion(torch.ones(3))
    assert again.recorded == 0
    assert criterion.calls == 4


def test_what_cannot_be_recorded_runs_as_it_is(
    again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = case("rtmdet")
    criterion = graphed(batch.criterion)

    def fails(function: Any) -> None:
        try:
            raise RuntimeError("called a synchronizing operation")
        finally:
            raise RuntimeError("recording failed")

    monkeypatch.setattr(again, "rehearse", fails)
    assert_equal(criterion, batch)
    cause = "graphed RTMDetCriterion: .*without a graph: called a synchronizing operation"
    with pytest.warns(UserWarning, match=cause):
        assert_equal(criterion, batch)
    for _ in range(2):  # says nothing more, and does not try
        assert_equal(criterion, batch)
    assert again.recorded == 0
    monkeypatch.undo()


def test_hooks_and_strange_arguments_run_as_they_are(again: Again) -> None:
    batch = case("rtmdet")
    calls = []
    batch.criterion.loss_cls.register_forward_hook(lambda *_: calls.append(1))
    criterion = graphed(batch.criterion)
    criterion(**batch.inputs)
    with pytest.warns(UserWarning, match="QualityFocalLoss has hooks"):
        criterion(**batch.inputs)
    assert len(calls) == 2 * 3
    with pytest.warns(UserWarning, match="an argument holds set"):
        assert_equal(criterion, Case(batch.criterion, {**batch.inputs, "unread": {1}}))


def test_errors_are_the_criterions(again: Again) -> None:
    criterion, (*_, batch) = trained("yolox")
    for wrong in ({"bbox_targets": None}, {"cls_targets": torch.ones(3, 2)}, {"unknown": 1}):
        inputs = {**batch.inputs, **wrong}
        messages = []
        for c in (batch.criterion, criterion):
            with pytest.raises((TypeError, ValueError)) as caught:
                c(**inputs)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    positional = [*batch.inputs.values()]
    assert_same(dict(leaves(criterion(*positional))), dict(leaves(criterion(**batch.inputs))), 0)
    for args, kwargs in ((positional, {"pos_masks": 1}), ([*positional, 1], {})):
        with pytest.raises(TypeError, match=r"multiple values|positional arguments"):
            criterion(*args, **kwargs)


def test_wrong_options() -> None:
    for option in ("max_graphs", "warmup", "slots"):
        with pytest.raises(ValueError, match=f"graphed: {option}"):
            graphed(case("rtmdet").criterion, **{option: 0})


def test_warm_up_may_last(again: Again) -> None:
    criterion, batches = trained(n=4, warmup=3)
    assert_equal(criterion, batches[2])
    assert again.recorded == 0
    assert_equal(criterion, batches[3])
    assert again.recorded == 2


@over_criteria
def test_it_is_the_criterion_still(name: str) -> None:
    batch = case(name)
    criterion = graphed(batch.criterion, slots=2)
    assert isinstance(criterion, type(batch.criterion))
    assert inspect.signature(criterion.forward) == inspect.signature(batch.criterion.forward)
    assert repr(criterion) == repr(batch.criterion)
    assert criterion.state_dict().keys() == batch.criterion.state_dict().keys()
    assert criterion.num_classes == batch.criterion.num_classes
    for _ in range(3):  # on a CPU
        assert_same(dict(leaves(criterion(**batch.inputs))), batch.step()[0], 0)
    assert recorded(criterion) == []
    assert recorded(graphed(criterion)) == []


def test_copies_and_files_have_no_graphs(again: Again) -> None:
    criterion, (*_, batch) = trained("dfine", slots=2, max_graphs=3)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(nn.ModuleList([criterion]))[0],
    ):
        assert recorded(other) == []
        assert other.weight_dict is not criterion.weight_dict
        before = again.recorded
        for _ in range(2):
            assert_equal(other, batch)
        assert again.recorded == before + 2
        held = vars(other)["_graphs_of_calls"]
        assert (held.slots, held.max_graphs) == (2, 3)
    assert type(criterion.plain()) is dt.DFINECriterion


def test_in_a_model_its_keys_have_no_prefix() -> None:
    model = nn.Module()
    model.criterion = Learned()
    keys = {*model.state_dict()}
    model.criterion = graphed(model.criterion)
    assert {*model.state_dict()} == keys == {"criterion.factor", "criterion.seen"}
    model.load_state_dict({"criterion.factor": torch.tensor(4.0), "criterion.seen": torch.ones(())})
    assert model.criterion.factor == 4
    assert next(iter(model.double().parameters())).dtype == torch.float64


@pytest.mark.parametrize("name", ["rtmdet", "detr"])
def test_under_a_compiler_it_is_the_criterion(name: str, again: Again) -> None:
    batch = case(name)
    compiled = torch.compile(graphed(batch.criterion), fullgraph=True, backend="eager")
    for _ in range(3):
        losses = dict(leaves(compiled(**batch.inputs)))
    assert again.recorded == 0
    assert_same(losses, dict(leaves(batch.criterion(**batch.inputs))), 1e-6)


def test_while_values_are_checked_or_transformed_it_is_the_criterion(again: Again) -> None:
    criterion, (*_, batch) = trained()
    before = recorded(criterion)[0].replays
    with dt.validation(True):
        criterion(**batch.inputs)
    torch.func.grad(lambda x: sum(criterion(**{**batch.inputs, "cls_score": x})["loss_cls"]).sum())(
        [x.detach() for x in batch.inputs["cls_score"]]
    )
    assert recorded(criterion)[0].replays == before


class TwoRanks:
    """As of a process group of two that say the same."""

    def __init__(self, backends: str) -> None:
        self.backends, self.sent = backends, 0

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return 2

    def get_backend_config(self) -> str:
        return self.backends

    def all_reduce(self, x: Tensor) -> None:
        self.sent += 1
        x.mul_(2)


@pytest.mark.parametrize("name", ["rtmdet", "detr", "dfine", "yolov9"])
def test_one_collective_a_step_whether_recorded_or_not(
    name: str, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal sends nothing, as other ranks may not rehearse then."""
    group = TwoRanks("cpu:gloo,cuda:nccl")
    monkeypatch.setattr(ranks, "dist", group)
    criterion = graphed(case(name).criterion)
    monkeypatch.setattr(again, "unsent", ranks.rehearsal)
    sent = []
    for seed in range(4):
        batch = case(name, seed=seed)
        losses = dict(leaves(criterion(**batch.inputs)))
        sent.append(group.sent)
        assert_same(losses, dict(leaves(batch.criterion(**repeatable(batch).inputs))), 0)
        group.sent = 0
    assert sent == [int(name != "yolov9")] * 4
    assert again.recorded == 2


def test_a_collective_of_the_host_is_not_recorded(
    again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "dist", TwoRanks("cpu:gloo,cuda:gloo"))
    batch = case("rtmdet")
    criterion = graphed(batch.criterion)
    criterion(**batch.inputs)
    with pytest.warns(UserWarning, match="process group .*gloo.* sends from the host"):
        assert_equal(criterion, batch)
    detr = case("detr")
    criterion = graphed(detr.criterion)
    for _ in range(3):
        assert_equal(criterion, detr)
    assert again.recorded == 2, "the normaliser is reduced beforehand"


def test_a_training_with_graphs_is_the_same(again: Again, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    losses = []
    for options in ([], ["--graphed"]):
        size = ["--steps", "5", "--batch-size", "2", "--image-size", "64", "--device", "cpu"]
        place = ["--output", str(tmp_path)]
        assert cli.main(["train", "--criterion", "detr", *size, *options, *place]) == 0
        losses.append(json.loads((tmp_path / "metrics.json").read_text())["losses"])
    torch.set_num_threads(threads)
    assert losses[0] == losses[1]
    assert again.recorded >= 2


class Accelerator:
    """A device's module, as torch has it, which writes down what it is asked for."""

    class CUDAGraph:
        def replay(self) -> None:
            pass

    def __init__(self) -> None:
        self.current, self.pools, self.log, self.sync = "main", 0, list[Any](), "default"

    def Stream(self, _: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append(("side waits", other)))

    def current_stream(self, _: Any = None) -> Any:
        name = self.current
        waits = functools.partial(self.log.append, (name, "waits"))
        return Stream(name, waits)

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def device(self, _: Any) -> Any:
        return nullcontext()

    stream = device

    @contextmanager
    def graph(
        self, graph: Any, pool: int, stream: Any, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.log.append((pool, capture_error_mode))
        yield

    def get_sync_debug_mode(self) -> str:
        return self.sync

    def set_sync_debug_mode(self, mode: str) -> None:
        self.sync = mode


@dataclass(frozen=True)
class Stream:
    name: str
    waits: Any = field(compare=False)

    def wait_stream(self, _: Any) -> None:
        self.waits()


def test_recordings_share_a_pool_while_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(recorder, "graph_class", lambda _: module.CUDAGraph)
    found = recorder.recorder_of(torch.device("cuda", 99))
    assert found is not None
    modes: list[str] = []
    found.rehearse(lambda: modes.append(module.sync))
    assert modes == ["default", "error"]
    assert module.sync == "default"
    module.log.clear()
    result, replay = found.record(lambda: 1)
    second = found.record(lambda: 2)
    assert result == 1
    with pytest.raises(ZeroDivisionError):
        found.record(lambda: 1 / 0)
    third = found.record(lambda: 3)
    assert module.log == [(pool, "thread_local") for pool in (1, 1, 1, 2)]
    module.log.clear()
    for module.current in ("main", "main", "other", "other", "main"):
        replay()
    assert module.log == [("other", "waits"), ("main", "waits")]
    del replay, second, third
    gc.collect()
    module.log.clear()
    found.record(lambda: 4)
    assert module.log == [(3, "thread_local")]


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@needs_gpu
@over_criteria
def test_graphs_of_a_gpu(name: str, backend: str, cuda: torch.device) -> None:
    """Recorded and replayed on new batches, lists included: bit by bit as eager."""
    if backend == "torch" and name in ("detr", "dfine"):
        pytest.skip("their solver runs on the host")
    batches = [with_denoising(name, (2 + i, 0, 3), seed=i).on(cuda) for i in range(4)]
    criterion = graphed(batches[0].criterion)
    for seed, batch in enumerate(batches):
        assert_equal(criterion, batch, seed)
    assert sum(graph.replays for graph in recorded(criterion)) >= 2


@needs_gpu
def test_graphs_of_a_gpu_share_memory_and_run_in_any_order(cuda: torch.device) -> None:
    batches = [sized(images, images).on(cuda) for images in (1, 2, 3)]
    criterion = graphed(batches[0].criterion)
    for _ in range(2):
        for batch in batches:
            assert_equal(criterion, batch)
    losses = [weighted(criterion(**batch.inputs)) for batch in batches]
    for batch, loss in zip(batches, losses, strict=True):
        found = torch.autograd.grad(loss, [*batch.leaves().values()])
        assert all(map(torch.equal, found, step(batch.criterion, batch.on(cuda))[1].values()))


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.sum() * float(x.detach().max())}


@needs_gpu
def test_what_waits_for_a_gpu_is_not_recorded(cuda: torch.device) -> None:
    criterion, x = graphed(Waiting()), torch.ones(3, device=cuda, requires_grad=True)
    criterion(x)
    with pytest.warns(UserWarning, match="graphed Waiting: .*synchroniz"):
        criterion(x)["loss"].backward()
    assert torch.rand(3, device=cuda).isfinite().all(), "random numbers can still be drawn"


@needs_gpu
def test_the_whole_step_of_the_readme() -> None:
    """Model, criterion and optimiser in one graph, as eager."""
    found = runpy.run_path(str(TESTS.parent / "examples" / "whole_step.py"))
    eager, replayed = (found["train"](in_a_graph=choice) for choice in (False, True))
    assert replayed == eager
    assert replayed[-1] < replayed[0]
