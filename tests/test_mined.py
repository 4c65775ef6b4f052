"""SSD's fused losses on both backends against float64, and what they must not look at."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_ops import samples
from torch import Tensor

from detloss_triton import use_backend
from detloss_triton.engine import REGISTRY, Sample
from detloss_triton.ops.mined import by_level

MINED: Any = REGISTRY["mined"]
SCORES, LABELS, WEIGHTS, CODES, ANCHORS, TARGETS, SIDES, DIVISOR = range(8)
GRADIENTS = (SCORES, CODES)

Losses = tuple[Tensor, list[Tensor | None]]


def evaluated(
    sample: Sample, wanted: tuple[int, ...] = GRADIENTS, reference: bool = False
) -> Losses:
    """Losses and gradients by scores and codes; the reference's are of float64."""
    inputs = [list(given) for given in sample.inputs]
    if reference:
        inputs = [[x.double() if x.is_floating_point() else x for x in given] for given in inputs]
    for i in wanted:
        inputs[i] = [x.detach().requires_grad_() for x in inputs[i]]
    with use_backend("torch") if reference else nullcontext():
        out = MINED(*map(tuple, inputs), **sample.params)
    if wanted:
        out.backward(torch.linspace(1, 2, len(out), dtype=out.dtype, device=out.device))
    gradients = (tuple(x.grad for x in inputs[i]) for i in GRADIENTS)
    return out.detach(), [rows(*each) if None not in each else None for each in gradients]


def rows(*levels: Tensor) -> Tensor:
    """All anchors of levels (N, k, n, ...): (N, A, ...)."""
    return torch.cat([level.flatten(1, 2) for level in levels], 1)


def close(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    if expected is None:
        assert ours is None
        return
    expected = expected.to(ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(sample: Sample, tolerance: float = 1e-5) -> Losses:
    """Ours beside float64's."""
    found = evaluated(sample)
    expected = evaluated(sample, reference=True)
    close(found[0], expected[0], tolerance)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        close(ours, theirs, tolerance)
    return found


def changed(sample: Sample, **inputs: Any) -> Sample:
    """The sample with some inputs changed, by a function of all anchors or to another."""
    given = list(sample.inputs)
    for name, change in inputs.items():
        i = MINED.inputs.index(name)
        if not callable(change):
            given[i] = change
        elif i in GRADIENTS:
            sizes = [level.shape[1:3] for level in given[i]]
            given[i] = by_level(change(rows(*given[i])), sizes)
        else:
            given[i] = (change(given[i][0]),)
    return Sample(tuple(given), sample.params)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def has_box(sample: Sample) -> Tensor:
    """(N, A) which anchors have a box that counts."""
    if sample.inputs[SIDES]:
        return sample.inputs[SIDES][0].ne(0).any(-1)
    x1, y1, x2, y2 = sample.inputs[TARGETS][0].unbind(-1)
    return (x2 > x1) & (y2 > y1)


def spread(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


@pytest.mark.parametrize("label", [0, 5, 6, 7, -1])
def test_all_rows_alike(label: int, backend: str, device: torch.device) -> None:
    """All positive, none, all ignored: six classes, of which label 6 is background."""
    for sample in samples(MINED, 30, device):
        alike = changed(sample, labels=lambda x: torch.full_like(x, label))
        out, (scores, _) = check(alike)
        assert bool(out[:3].ne(0).any()) == bool(scores.ne(0).any()) == (0 <= label < 6)


@pytest.mark.parametrize("label", [2**31 + 6, -(2**31), 2**32, 2**62])
def test_hostile_labels(label: int, backend: str, device: torch.device) -> None:
    """As if the row were not there, though the low 32 bits are a class."""
    for sample in samples(MINED, 30, device):
        check(changed(sample, labels=lambda x: x.masked_fill(x == 1, label)))


@pytest.mark.parametrize("empty", ["images", "anchors"])
def test_nothing(empty: str, backend: str, device: torch.device) -> None:
    for sample in samples(MINED, 30, device):
        inputs = list(sample.inputs)
        for i in range(DIVISOR):
            positions = (..., slice(0), slice(None)) if i in GRADIENTS else (slice(None), slice(0))
            inputs[i] = tuple(x[:0] if empty == "images" else x[positions] for x in inputs[i])
        out, (scores, codes) = evaluated(Sample(tuple(inputs), sample.params))
        assert out.tolist() == [0.0] * (0 if empty == "images" else 6)
        n = (0, 30) if empty == "images" else (3, 0)
        assert scores.shape == (*n, 7) and codes.shape == (*n, 4)


@pytest.mark.parametrize("kind", ["number", "float", "integer"])
@pytest.mark.parametrize("by", [0, 1, 4])
def test_divisors(by: int, kind: str, backend: str, device: torch.device) -> None:
    """0 counts as 1; boxes are divided by 2^-23 more."""
    sample, *_ = samples(MINED, 30, device)
    whole = evaluated(changed(sample, divisor=(torch.tensor(1, device=device),)))[0]
    dtype = torch.int64 if kind == "integer" else torch.float32
    divisor = () if kind == "number" else (torch.tensor(by, dtype=dtype, device=device),)
    divided = changed(sample, divisor=divisor)
    divided.params["number"] = float(by)
    out, _ = check(divided)
    close(out, whole / max(by, 1))
    assert whole.ne(0).sum() > 3


def test_ties(backend: str, device: torch.device) -> None:
    """Of equal negatives the first count, wherever the positive is."""
    with device:
        scores = torch.zeros(2, 1, 9, 4)
        labels = torch.full((2, 9), 3)
        labels[0, 4], labels[1, 0] = 1, 0
        ones, boxes = torch.ones(2, 9), torch.zeros(2, 9, 4)
        codes = boxes.unsqueeze(1)
        given = (scores,), (labels,), (ones,), (codes,), (), (boxes,), (boxes,), ()
    sample = Sample(given, {**PARAMS, "ratio": 3})
    out, (gradient, _) = check(sample)
    close(out[:2], torch.full((2,), 4 * math.log(4.0), device=device))
    used = gradient.ne(0).any(-1)
    assert [row.nonzero()[:, 0].tolist() for row in used] == [[0, 1, 2, 4], [0, 1, 2, 3]]


PARAMS = {"number": 1.0, "ratio": 3, "beta": 1.0, "decode": "", "decode_constants": ()}


@pytest.mark.parametrize("ratio", [0, 1, 10**6, 10**12])
def test_ratios(ratio: int, backend: str, device: torch.device) -> None:
    for sample in samples(MINED, 30, device):
        sample.params["ratio"] = ratio
        check(sample)


def test_labels_far_below_the_largest_logit(backend: str, device: torch.device) -> None:
    """Exponentials relative to them would overflow; of the other rows they are as before."""
    for sample in samples(MINED, 60, device):
        check(changed(sample, scores=lambda x: x * 60))
        one = torch.zeros_like(sample.inputs[LABELS][0], dtype=torch.bool)
        one[:, 20] = True
        far = changed(sample, scores=lambda x, one=one: torch.where(one.unsqueeze(-1), x * 60, x))
        near = changed(sample, scores=torch.clone)
        (_, (ours, _)), (_, (theirs, _)) = check(far), evaluated(near)
        both = ours.ne(0).any(-1) & theirs.ne(0).any(-1) & ~one
        assert both.any() and torch.equal(ours[both], theirs[both])


def test_several_blocks(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's negatives, and its partial sums, in more blocks than one."""
    monkeypatch.setattr("detloss_triton.ops.selection._BLOCK", 16)
    monkeypatch.setattr("detloss_triton.ops.mined._BLOCK", 2)
    for sample in samples(MINED, 130, device):
        check(changed(sample, scores=torch.Tensor.round))


def test_unused_rows_hold_anything(backend: str, device: torch.device) -> None:
    """NaN in rows of weight 0 and in sides of weight 0 add nothing, and have gradient 0."""
    for sample in samples(MINED, 60, device):
        unused = sample.inputs[WEIGHTS][0] == 0
        boxes = ~has_box(sample)
        sides = boxes.unsqueeze(-1).expand(-1, -1, 4)
        if sample.inputs[SIDES]:
            sides = sample.inputs[SIDES][0] == 0
        changes = {
            "scores": lambda x, unused=unused: x.masked_fill(unused.unsqueeze(-1), math.nan),
            "codes": lambda x, boxes=boxes: x.masked_fill(boxes.unsqueeze(-1), math.nan),
            "targets": lambda x, sides=sides: x.masked_fill(sides, math.nan),
        }
        if sample.params["decode"]:
            changes["anchors"] = changes["codes"]
        if sample.params["decode"] == "":
            changes["codes"] = changes["targets"]
        out, gradients = check(changed(sample, **changes))
        # As changed, in memory: another order of rows is rounded in another way.
        clean, theirs = evaluated(changed(sample, **dict.fromkeys(changes, torch.clone)))
        assert torch.equal(out, clean) and out.isfinite().all()
        for ours, each in zip(gradients, theirs, strict=True):
            assert ours is not None and torch.equal(ours, each)


def test_nan_losses_are_mined_first(backend: str, device: torch.device) -> None:
    """A NaN negative is the hardest of its image, and shows in that image's loss alone."""
    sample, *_ = samples(MINED, 60, device)
    labels = sample.inputs[LABELS][0]
    weights = torch.ones_like(sample.inputs[WEIGHTS][0])
    row = labels[0].eq(6).nonzero()[-1, 0]
    scores = sample.inputs[SCORES][0].clone()
    scores[0, 0, row, 2] = math.nan
    out, (gradient, _) = check(changed(sample, weights=(weights,), scores=(scores,)))
    assert out.isnan().tolist() == [True] + [False] * 5
    assert gradient[0].isnan().any(-1).nonzero()[:, 0].tolist() == [row]
