"""YOLOX's fused losses on both backends against float64, and what they must not look at."""

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

POSITIVES: Any = REGISTRY["positives"]
INPUTS: list[str] = POSITIVES.inputs
GRADIENTS = ("objectness", "classes", "boxes", "raw")

Losses = tuple[Tensor, dict[str, Tensor]]


def evaluated(
    sample: Sample, wanted: tuple[str, ...] = GRADIENTS, reference: bool = False
) -> Losses:
    """Losses and gradients of what is wanted and there; the reference's are of float64."""
    given = {name: list(x) for name, x in zip(INPUTS, sample.inputs, strict=True)}
    if reference:
        given = {
            name: [x.double() if x.is_floating_point() else x for x in inputs]
            for name, inputs in given.items()
        }
    leaves = {}
    for name in wanted:
        if given[name]:
            given[name] = [leaves.setdefault(name, given[name][0].detach().requires_grad_())]
    with use_backend("torch") if reference else nullcontext():
        out = POSITIVES(*map(tuple, given.values()), **sample.params)
        if leaves:
            out.backward(torch.linspace(1, 2, len(out), dtype=out.dtype, device=out.device))
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.to(ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(sample: Sample, wanted: tuple[str, ...] = GRADIENTS, tolerance: float = 1e-5) -> Losses:
    """Ours beside float64's."""
    out, gradients = evaluated(sample, wanted)
    expected, theirs = evaluated(sample, wanted, reference=True)
    assert out.dtype == torch.float32
    close(out, expected)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        close(gradient, theirs[name], tolerance)
    return out, gradients


def changed(sample: Sample, **changes: Any) -> Sample:
    """The sample with some inputs changed, by a function of the tensor or to another."""
    given = list(sample.inputs)
    for name, change in changes.items():
        i = INPUTS.index(name)
        given[i] = tuple(map(change, given[i])) if callable(change) else change
    return Sample(tuple(given), dict(sample.params))


def unset(sample: Sample) -> Tensor:
    """Anchors without a target, (N, A)."""
    mask = sample.inputs[INPUTS.index("mask")][0]
    n = len(sample.inputs[INPUTS.index("of_boxes")][0])
    return ~(mask & (mask.cumsum(0) <= n)).view(2, -1)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(3)[::3]


def spread(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


@pytest.mark.parametrize("n_targets", [0, 1, 80, 90])
@pytest.mark.parametrize("n_set", [0, 1, 80])
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore")
def test_none_and_all_are_positive(
    n_set: int, n_targets: int, backend: str, device: torch.device
) -> None:
    """Of 80 anchors; with as many targets as anchors are set, fewer, and more."""
    for sample in samples(POSITIVES, 40, device):
        mask = torch.arange(80, device=device) >= 80 - n_set
        given = {
            name: lambda x: x[:1].expand(n_targets, -1) * 1.0
            for name in ("of_classes", "of_boxes", "of_raw")
        }
        out, gradients = check(changed(sample, mask=(mask,), **given))
        n_used = gradients["classes"].ne(0).any(-1).sum()
        assert n_used == min(n_set, n_targets)
        assert bool(out[0] != 0) == bool(n_used > 0)


@pytest.mark.parametrize("empty", ["images", "anchors"])
def test_nothing(empty: str, backend: str, device: torch.device) -> None:
    for sample in samples(POSITIVES, 5, device):
        each = {name: lambda x: x[:0] if empty == "images" else x[:, :0] for name in GRADIENTS}
        packed = {name: lambda x: x[:0] for name in (*INPUTS[4:8], "mask")}
        out, gradients = evaluated(changed(sample, **each, **packed))
        assert out.tolist() == [0.0] * len(sample.params["factors"])
        assert gradients["classes"].shape == ((0, 5, 6) if empty == "images" else (2, 0, 6))


def test_several_blocks(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of more programs than are added at a time, and more tiles than one of classes."""
    monkeypatch.setattr("detloss_triton.ops.positives._BLOCK", 2)
    monkeypatch.setattr("detloss_triton.ops.positives.TILE", 32)
    for sample in samples(POSITIVES, 20, device)[:1]:
        check(sample)
        wide = {name: lambda x: x.repeat_interleave(4, -1) for name in ("classes", "of_classes")}
        check(changed(sample, **wide))


@pytest.mark.parametrize("kind", ["number", "float", "integer"])
def test_divisors(kind: str, backend: str, device: torch.device) -> None:
    for sample in samples(POSITIVES, 30, device):
        sample.params["number"] = 1.0
        whole, _ = evaluated(changed(sample, divisor=()))
        dtype = torch.int64 if kind == "integer" else torch.float32
        divisor = () if kind == "number" else (torch.tensor(4, dtype=dtype, device=device),)
        sample.params["number"] = 4.0
        out, _ = check(changed(sample, divisor=divisor))
        close(out, whole / 4)


def test_unused_rows_hold_anything(backend: str, device: torch.device) -> None:
    """NaN in what background predicts, but for its objectness, adds nothing, gradient 0."""
    for sample in samples(POSITIVES, 60, device):
        at = unset(sample).unsqueeze(-1)
        nan = {
            name: lambda x, at=at: x.masked_fill(at, math.nan)
            for name in ("classes", "boxes", "raw")
        }
        out, gradients = check(changed(sample, **nan))
        clean, theirs = evaluated(sample)
        assert torch.equal(out, clean) and out.isfinite().all()
        assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


def test_nan_shows_where_it_counts(backend: str, device: torch.device) -> None:
    """In the loss of what it is in, and no other."""
    for sample in samples(POSITIVES, 60, device):
        image, row = (~unset(sample)).nonzero()[-1].tolist()
        for i, name in enumerate(("classes", "boxes", "objectness", "raw")):
            if name == "raw" and len(sample.params["factors"]) == 3:
                continue

            def poisoned(x: Tensor, at: tuple[int, int] = (image, row)) -> Tensor:
                x = x.clone()
                x[at] = math.nan
                return x

            out, _ = check(changed(sample, **{name: poisoned}), wanted=())
            assert out.isnan().nonzero()[:, 0].tolist() == [i]


def test_negative_targets_weigh_nothing(backend: str, device: torch.device) -> None:
    """As in binary cross-entropy, where they are labels to be ignored."""
    for sample in samples(POSITIVES, 40, device):
        none = {name: lambda x: torch.full_like(x, -0.5) for name in ("of_objects", "of_classes")}
        out, gradients = check(changed(sample, **none))
        assert out[0] == out[2] == 0 and out[1] != 0
        assert not gradients["classes"].any() and not gradients["objectness"].any()
