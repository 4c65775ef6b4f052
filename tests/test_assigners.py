"""The assigners: against OTX's, kernels against references, hostile batches, launches, memory."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from assigner_cases import ARGUMENTS, CLASSES, Case, cases
from machine import CPU, TESTS, environment, needs_triton, why_no_kernels
from synchronisation import NoHostReads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import Unchanged

from detloss_triton import Targets, assigners, use_backend
from detloss_triton import backend as backends
from detloss_triton.anchors import Anchors
from detloss_triton.assigners import Assignment
from detloss_triton.targets import pack

# Those that look at predictions.
LOOKING = ["SimOTAAssigner", "DynamicSoftLabelAssigner"]
NAMES = [*LOOKING, "ATSSAssigner", "MaxIoUAssigner"]
MOST_LAUNCHES = 6
# What rounds in float32, relative to a coordinate or a logit; and absolutely, in a cost of OTX's
# SimOTA of a pair that is not both inside and near, to which it adds 1e5.
ROUNDING, SIMOTA_ROUNDING = 2e-6, 0.02
TRIALS = 8


def assigned(case: Case, targets: Any = None, assigner: Any = None) -> Assignment:
    """What ours assigns in a case."""
    assigner = assigner or getattr(assigners, case.name)(**case.arguments)
    targets = case.targets if targets is None else targets
    if case.name == "SimOTAAssigner":
        return assigner(case.logits, case.objectness, case.boxes, case.priors, targets)
    if case.name == "DynamicSoftLabelAssigner":
        return assigner(case.logits, case.boxes, case.priors, targets)
    priors = Anchors(case.priors, case.sizes) if case.name == "ATSSAssigner" else case.priors
    return assigner(priors, targets)


def changed(case: Case, change: Any) -> Case:
    """The case with `change(x)` for every tensor of floating point."""
    fields = {
        field.name: change(value)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), Tensor)
    }
    targets = [{**target, "boxes": change(target["boxes"])} for target in case.targets]
    return dataclasses.replace(case, targets=targets, **fields)


def codes(found: Assignment) -> Tensor:
    """As OTX says it: the target's index, -1 for none, -2 for what is ignored."""
    if found.ignored is None:
        return found.target
    return torch.where(found.ignored, -2, found.target)


def clear(case: Case) -> Tensor:
    """(B, A) anchors whose assignment no rounding decides: none of some trials changes it, in which
    predictions and targets change by more than they are rounded by. Anchors are round numbers.
    """
    exact = changed(case, Tensor.double)
    generator = torch.Generator().manual_seed(0)

    def jittered(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + ROUNDING * noise * x.abs().clamp(min=1)

    expected = codes(assigned(exact))
    same = torch.ones_like(expected, dtype=torch.bool)
    for _ in range(TRIALS):
        near = dataclasses.replace(changed(exact, jittered), priors=exact.priors)
        if case.name == "SimOTAAssigner":
            near.logits += SIMOTA_ROUNDING * torch.randn(near.logits.shape, generator=generator)
        same &= codes(assigned(near)) == expected
    return same


def golden() -> list[Tensor]:
    return unpacked(torch.load(TESTS / "golden" / "assigners" / "otx.pt"))


def unpacked(codes_of_all: Tensor) -> list[Tensor]:
    """The answers to each of `cases()`, which lie one behind the other."""
    shapes = [case.logits.shape[:2] for case in cases()]
    parts = codes_of_all.long().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def answered(name: str, answers: list[Tensor]) -> list[tuple[Case, Tensor]]:
    found = [(c, x) for c, x in zip(cases(), answers, strict=True) if c.name == name]
    assert len(found) == len(ARGUMENTS[name]) * 8
    return found


@pytest.mark.parametrize("name", NAMES)
def test_as_otx_assigns(name: str) -> None:
    n_assigned, n_clear = 0, 0
    with use_backend("torch"):
        for case, expected in answered(name, golden()):
            is_clear = clear(case)
            ours = codes(assigned(case))
            assert torch.equal(ours[is_clear], expected[is_clear]), str(case)
            n_assigned += (expected >= 0).sum().item()
            n_clear += (is_clear & (expected >= 0)).sum().item()
    assert n_assigned > 100 and n_clear > 0.9 * n_assigned


@pytest.mark.skipif("OTX_ROOT" not in os.environ, reason="needs OTX_ROOT, the wheel of otx==2.3.0")
def test_the_golden_answers_are_otx_s(tmp_path: Any) -> None:
    path = tmp_path / "answers.pt"
    program = [sys.executable, TESTS / "assigner_cases.py", path]
    run = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert torch.equal(torch.load(path), torch.load(TESTS / "golden" / "assigners" / "otx.pt"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("kernels")
def test_kernels_assign_as_the_reference(name: str, device: torch.device) -> None:
    for case in [*cases(name)][::5]:
        found = []
        for chosen in ("torch", "triton"):
            with use_backend(chosen):
                found.append(assigned(on(case, device)))
        same(*found)


def on(case: Case, device: torch.device) -> Case:
    case = changed(case, lambda x: x.to(device))
    targets = [{key: x.to(device) for key, x in t.items()} for t in case.targets]
    return dataclasses.replace(case, targets=targets)


def same(ours: Assignment, theirs: Assignment) -> None:
    for name, a, b in zip(Assignment._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def hostile(name: str) -> list[tuple[str, Case]]:
    """Batches of one image, named."""
    usual = next(cases(name))
    usual = dataclasses.replace(
        usual,
        logits=usual.logits[:1],
        objectness=usual.objectness[:1],
        boxes=usual.boxes[:1],
        targets=usual.targets[:1],
    )

    def of(*boxes: list[float], labels: list[int] | None = None) -> Case:
        truth = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels or [1] * len(boxes))}
        return dataclasses.replace(usual, targets=[truth])

    usual_box = [30.0, 20.0, 70.0, 90.0]
    bad = changed(usual, torch.clone)
    bad.logits[0, ::7], bad.boxes[0, ::5, 0], bad.objectness[0, ::11] = (math.nan,) * 3
    bad.boxes[0, 3::5, 1], bad.logits[0, 3::7, 1] = math.inf, -math.inf
    few = dataclasses.replace(
        usual,
        priors=usual.priors[:1],
        logits=usual.logits[:, :1],
        objectness=usual.objectness[:, :1],
        boxes=usual.boxes[:, :1],
        sizes=(1, *(0 for _ in usual.sizes[1:])),
        targets=[{"boxes": torch.tensor([[-9.0, -9.0, 20, 20]] * 3), "labels": torch.arange(3)}],
    )
    return [
        ("outside the image", of([-90.0, -80.0, -20.0, -30.0], [500.0, 10.0, 600.0, 50.0])),
        ("of no size", of([40.0, 40.0, 40.0, 40.0], [9.0, 9.0, 9.0, 90.0], usual_box)),
        ("inside out", of([70.0, 90.0, 30.0, 20.0], usual_box)),
        ("equal", of(usual_box, usual_box, usual_box)),
        ("larger than the image", of([-500.0, -500.0, 700.0, 800.0], usual_box)),
        ("not finite", of([math.nan, 0.0, 9.0, 9.0], [0.0, 0.0, math.inf, math.inf], usual_box)),
        ("of no class", of(*[usual_box] * 4, labels=[-1, CLASSES, 2**40, -(2**40)])),
        ("of one class", of(*[usual_box] * 3, labels=[-3, 2, 2**31 + 2])),
        ("predictions not finite", bad),
        ("one anchor, wanted by all", few),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_batches(name: str, device: torch.device) -> None:
    """Legal results on both backends, the same from the reference, the CPU's form and kernels."""
    for what, case in hostile(name):
        case = on(case, device)
        found = []
        targets = pack(case.targets)
        with Unchanged((case.logits, case.objectness, case.boxes, targets)):
            for chosen in ("torch",) if why_no_kernels() else ("torch", "triton"):
                with use_backend(chosen):
                    found += [assigned(case), assigned(case)]
            with use_backend("torch"), NoHostReads(CPU):
                found.append(assigned(case, targets))
        for other in found[1:]:
            same(other, found[0])
        n = len(case.targets[0]["labels"])
        target, label, metric, box, _ = found[0]
        got = target >= 0
        assert target.min() >= -1 and target.max() < n, what
        assert metric.isfinite().all() and (metric >= 0).all() and (metric <= 1).all(), what
        assert (metric[~got] == 0).all() and (box[~got] == 0).all() and (label[~got] == -1).all()
        assert torch.equal(label[got], case.targets[0]["labels"][target[got]]), what
        of_target = case.targets[0]["boxes"][target[got]]
        torch.testing.assert_close(box[got], of_target, rtol=0, atol=0, equal_nan=True, msg=what)
        if what == "equal":
            # The first; but the best anchor that several come to is the last one's.
            expected = {0, n - 1} if name == "MaxIoUAssigner" else {0}
            assert set(target[got].tolist()) == expected
        if what == "one anchor, wanted by all" and name != "ATSSAssigner":  # of no deviation
            assert got.all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_read(name: str, backend: str, device: torch.device) -> None:
    case = on(next(cases(name)), device)
    found = assigned(case)
    targets = pack(case.targets)
    for count, labels, boxes in zip(targets.counts.tolist(), *targets[:2], strict=True):
        labels[count:], boxes[count:] = 1, math.nan
        boxes[-1] = torch.tensor([0.0, 0.0, 128.0, 128.0])
    same(assigned(case, targets), found)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_few_launches(name: str) -> None:
    for case in (next(cases(name)), [*cases(name)][7]):
        meta = on(case, torch.device("meta"))
        with backends.record_launches() as launches:
            assigned(meta, Targets(*(x.to("meta") for x in pack(case.targets))))
        assert 0 < len(launches) <= MOST_LAUNCHES


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time, of those made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        return out

    def count(self, storage: Any) -> None:
        key, n = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += n
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, n)

    def forget(self, key: int, n: int) -> None:
        self.known.discard(key)
        self.now -= n


def large(name: str) -> tuple[Case, Targets]:
    """8 images of 8,400 anchors with 1,000 boxes each, on meta tensors."""
    case = next(cases(name))
    n = 8400
    few = -(-n // len(case.priors))
    case = dataclasses.replace(
        case,
        priors=case.priors.repeat(few, 1)[:n],
        sizes=(6400, 1600, 400),
        logits=torch.empty(8, n, 80),
        objectness=torch.empty(8, n),
        boxes=torch.empty(8, n, 4),
        targets=[],
    )
    targets = torch.empty(8, 1000).long(), torch.empty(8, 1000, 4), torch.empty(8).long()
    return changed(case, lambda x: x.to("meta")), Targets(*(x.to("meta") for x in targets))


@pytest.mark.parametrize("name", NAMES)
def test_many_boxes_take_less_than_a_gibibyte(name: str) -> None:
    case, targets = large(name)
    with use_backend("torch"), Memory() as memory:
        assigned(case, targets)
    assert 2**24 < memory.peak < 2**30


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_takes_any_number_of_boxes(name: str) -> None:
    graphs = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(assigned, fullgraph=True, backend=counting, dynamic=True)
    for case in [*cases(name)][::2][:4]:
        targets = pack(case.targets)
        assigner = getattr(assigners, name)(**case.arguments)
        same(compiled(case, targets, assigner), assigned(case, targets))
    assert graphs <= 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SimOTAAssigner", {"candidate_topk": 0}, "candidate_topk must be at least 1"),
        ("SimOTAAssigner", {"center_radius": -1.0}, "center_radius must not be negative"),
        ("SimOTAAssigner", {"iou_weight": "3"}, "iou_weight must be a number"),
        ("DynamicSoftLabelAssigner", {"topk": 1.5}, "topk must be an integer"),
        ("ATSSAssigner", {"topk": True}, "topk must be an integer"),
    ],
)
def test_impossible_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: {message}"):
        getattr(assigners, name)(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_shapes(name: str) -> None:
    case = next(cases(name))
    wrong = dataclasses.replace(case, priors=case.priors[:, :3])
    with pytest.raises(ValueError, match=rf"{name}: (points|anchors) must have shape .* got"):
        assigned(wrong)
    if name in LOOKING:
        with pytest.raises(
            ValueError, match=rf"{name}: targets has 1 images, the predictions have 2"
        ):
            assigned(case, pack(case.targets[:1]))


@pytest.mark.parametrize("name", ["ATSSAssigner", "MaxIoUAssigner"])
def test_what_is_not_inside_is_as_if_not_there(
    name: str, backend: str, device: torch.device
) -> None:
    case = on(next(cases(name)), device)
    assigner = getattr(assigners, name)(**case.arguments)
    inside = torch.rand(len(case.priors), generator=torch.Generator().manual_seed(0)) > 0.4
    of_level = [int(x.sum()) for x in inside.split(case.sizes)]
    inside = inside.to(device)
    kept = case.priors[inside]
    if name == "ATSSAssigner":
        found = assigner(Anchors(case.priors, case.sizes), case.targets, inside)
        expected = assigner(Anchors(kept, tuple(of_level)), case.targets)
    else:
        found = assigner(case.priors, case.targets, inside)
        expected = assigner(kept, case.targets)
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a[:, inside], b)
    assert found.ignored is not None and found.ignored[:, ~inside].all()
    assert (found.target[:, ~inside] == -1).all() and (expected.target >= 0).any()


def test_anchors_of_a_crowd_are_ignored(backend: str, device: torch.device) -> None:
    """Those with more than the given part in an ignored box, in the first image."""
    case = on(next(cases("MaxIoUAssigner")), device)
    crowd = torch.tensor([[30.0, 20.0, 90.0, 100.0], [0.0, 0.0, 128.0, 128.0]], device=device)
    labels = torch.zeros(2, device=device, dtype=torch.int64)
    ignored = [
        {"boxes": crowd[:1], "labels": labels[:1]},
        {"boxes": crowd[:0], "labels": labels[:0]},
    ]
    usual = {"pos_iou_thr": 0.4, "neg_iou_thr": 0.4}
    found = assigners.MaxIoUAssigner(**usual, ignore_iof_thr=0.3)(
        case.priors, case.targets, ignored=ignored
    )
    without = assigners.MaxIoUAssigner(**usual)(case.priors, case.targets, ignored=ignored)
    low = torch.maximum(case.priors[:, :2], crowd[0, :2])
    high = torch.minimum(case.priors[:, 2:], crowd[0, 2:])
    area = (case.priors[:, 2:] - case.priors[:, :2]).prod(1)
    is_crowd = (high - low).clamp(min=0).prod(1) / area > 0.3
    assert 0 < is_crowd.sum() < len(is_crowd)
    assert found.ignored is not None and without.ignored is not None
    assert found.ignored[0, is_crowd].all() and (found.target[0, is_crowd] == -1).all()
    assert torch.equal(found.target[1], without.target[1]) and not without.ignored.any()
    # Also of an image without a target.
    nothing = [{"boxes": crowd[:0], "labels": labels[:0]}] * 2
    alone = assigners.MaxIoUAssigner(**usual, ignore_iof_thr=0.3)(
        case.priors, nothing, ignored=ignored
    )
    assert torch.equal(alone.ignored, is_crowd & torch.tensor([[True], [False]], device=device))
    assert (alone.target == -1).all()


def test_of_equal_costs_the_first_anchor_is_taken(backend: str, device: torch.device) -> None:
    """Two targets over eight equal anchors: the first bids for 0 to 3, the second likewise."""
    with device:
        points = torch.tensor([[50.0, 50.0, 8.0, 8.0]]).repeat(8, 1)
        boxes = torch.tensor([[30.0, 30.0, 70.0, 54.0]]).repeat(1, 8, 1)
        truth = torch.tensor([[30.0, 30.0, 70.0, 70.0]] * 2)
        targets = [{"boxes": truth, "labels": torch.tensor([1, 1])}]
        scores = torch.zeros(1, 8, 3), torch.zeros(1, 8)
    # The IoU is 0.6: of eight 4.8, of five 3.
    found = assigners.SimOTAAssigner()(*scores, boxes, points, targets)
    assert found.target[0].tolist() == [0] * 4 + [-1] * 4
    found = assigners.SimOTAAssigner(candidate_topk=4)(*scores, boxes, points, targets)
    assert found.target[0].tolist() == [0] * 2 + [-1] * 6
    soft = assigners.DynamicSoftLabelAssigner()(scores[0], boxes, points, targets)
    assert soft.target[0].tolist() == [0] * 4 + [-1] * 4
    torch.testing.assert_close(soft.metric[0, :4], torch.full((4,), 0.6, device=device))


def test_of_equal_distances_the_first_anchor_is_taken(backend: str, device: torch.device) -> None:
    """Four anchors are as near as one another, of which two are candidates."""
    with device:
        centre = torch.tensor([[100.0, 100], [46, 50], [54, 50], [50, 46], [50, 54], [0, 0]])
        boxes = torch.cat([centre - 10, centre + 10], 1)
        targets = [{"boxes": torch.tensor([[40.0, 40, 60, 60]]), "labels": torch.tensor([0])}]
    found = assigners.ATSSAssigner(topk=2)(Anchors(boxes, (6,)), targets)
    assert found.target[0].tolist() == [-1, 0, 0, -1, -1, -1]
