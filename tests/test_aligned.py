"""YOLOv9's terms in one op: numbers, gradients, layouts, and what must not be looked at."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from guarded import guarded
from test_ops import assert_no_worse, cast, samples
from torch import Tensor

import detloss_triton as dt
from detloss_triton.engine import REGISTRY, Sample, mapped
from detloss_triton.ops.distribution import MAX_BINS

ALIGNED: Any = REGISTRY["aligned"]
PREDICTIONS = ("logits", "distributions", "distances")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def leaves_of(sample: Sample) -> list[Tensor]:
    """The predictions, in memory layouts of their own, of which gradients are wanted."""
    return [x.requires_grad_() for given in sample.inputs[:3] for x in given]  # type: ignore[union-attr]


def upstream(out: Tensor) -> Tensor:
    return torch.arange(1, len(out) + 1).to(out) / 4


def computed(sample: Sample, call: Any = ALIGNED) -> list[Tensor]:
    """[losses, *gradients]."""
    sample = sample.changed(torch.Tensor.detach)
    leaves = leaves_of(sample)
    out = call(*sample.inputs, **sample.params)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def names(sample: Sample) -> list[str]:
    each = zip(PREDICTIONS, sample.inputs, strict=False)
    return ["out", *(f"{name} {i}" for name, given in each for i, _ in enumerate(given))]  # type: ignore[arg-type]


def assert_exact(sample: Sample) -> list[Tensor]:
    """As exact as the reference in float32; returns what was computed."""
    ours = computed(sample)
    with dt.use_backend("torch"):
        peer = computed(cast(sample, torch.float32), ALIGNED.reference)
        truth = computed(cast(sample, torch.float64), ALIGNED.reference)
    assert_no_worse(names(sample), ours, peer, truth)
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [x.dtype for x in leaves_of(sample)]
    return ours


def with_inputs(sample: Sample, **changes: Any) -> Sample:
    inputs = dict(zip(ALIGNED.inputs, sample.inputs, strict=True))
    return Sample(tuple({**inputs, **changes}.values()), sample.params)


def channels_first(x: Tensor) -> Tensor:
    """The same rows, as a view of memory whose anchors are neighbours, as heads give them."""
    dims = 0, *range(x.dim() - 1, 0, -1)
    return x.permute(dims).contiguous().permute(dims)


def spread(x: Tensor) -> Tensor:
    """Every second entry of wider memory, of which the others are NaN."""
    wide = x.new_full((*x.shape, 2), math.nan if x.is_floating_point() else -7)
    wide[..., 0] = x
    return wide[..., 0]


def every_dimension_reversed(x: Tensor) -> Tensor:
    dims = tuple(range(x.dim() - 1, -1, -1))
    return x.permute(dims).contiguous().permute(dims)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("matched", ["some", "none", "none exists", "no scores", "no images"])
def test_every_gradient_is_written(matched: str, backend: str, device: torch.device) -> None:
    """Memory holds NaN before it is written. What has no target has zeros."""
    for sample in samples(ALIGNED, 150, device)[-1:]:
        (target,), (score,) = sample.inputs[3:5]  # type: ignore[misc]
        if matched == "none":
            sample = with_inputs(sample, target=(torch.full_like(target, -1),))
        elif matched == "none exists":
            sample = with_inputs(sample, target=(target + 1000,))
        elif matched == "no scores":
            sample = with_inputs(sample, score=(torch.zeros_like(score),))
        elif matched == "no images":
            names_ = ("logits", "distributions", "distances", "target", "score", "targets")
            changes = {
                name: tuple(x[:0] for x in given)  # type: ignore[union-attr]
                for name, given in zip(ALIGNED.inputs, sample.inputs, strict=True)
                if name in names_
            }
            sample = with_inputs(sample, **changes)
        out, *gradients = computed(sample)
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
        n = len(gradients) // 3
        for g in gradients[n:]:
            if matched != "some":
                assert g.eq(0).all()
            assert g.flatten(2).ne(0).any(-1).float().mean().nan_to_num() < 0.3
        if matched != "some":
            assert out.view(3, -1)[1:].eq(0).all()
        if matched != "no images":
            assert all(g.ne(0).all() for g in gradients[:n])


def test_what_has_no_target_may_hold_anything(backend: str, device: torch.device) -> None:
    for sample in samples(ALIGNED, 60, device)[-1:]:
        expected = computed(sample)
        heads = sample.params["heads"]
        (target,), (score,), _, (targets,) = sample.inputs[3:]  # type: ignore[misc]
        sizes = [x.shape[1] for x in sample.inputs[0][: len(sample.inputs[0]) // heads]]  # type: ignore[index,arg-type,union-attr]
        unused = [m for head in (target < 0).chunk(heads) for m in head.split(sizes, 1)]
        changes = {
            name: tuple(
                x.masked_fill(m[(..., *[None] * (x.dim() - 2))], math.nan)
                for x, m in zip(given, unused, strict=True)
            )
            for name, given in zip(PREDICTIONS[1:], sample.inputs[1:3], strict=True)  # type: ignore[arg-type]
        }
        # Nor does a target of no class count, or a score without target.
        changes["score"] = (score.masked_fill(target < 0, math.nan),)
        is_class = (targets[..., :1] >= 0) & (targets[..., :1] < sample.inputs[0][0].shape[2])  # type: ignore[index]
        boxes = targets[..., 1:].masked_fill(~is_class, math.nan)
        changes["targets"] = (torch.cat([targets[..., :1], boxes], -1),)
        found = computed(with_inputs(sample, **changes))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nan_of_what_has_a_target_shows(backend: str, device: torch.device) -> None:
    *_, sample = samples(ALIGNED, 150, device)
    target, score = torch.full((4, 150), -1, device=device), torch.zeros(4, 150, device=device)
    target[:, 3], score[:, 3] = 0, 0.5
    sample = with_inputs(sample, target=(target,), score=(score,))
    for i, name in enumerate(PREDICTIONS):
        given = [x.clone() for x in sample.inputs[i]]  # type: ignore[union-attr]
        given[0][0, 3] = math.nan  # of the first head
        out, *gradients = computed(with_inputs(sample, **{name: tuple(given)}))
        shown = out.view(3, 2).isnan().tolist()
        assert shown == [[i == term, False] for term in range(3)], name
        per_input = [gradients[j * 6][0, 3].isnan().any().item() for j in range(3)]
        assert per_input == [j == i for j in range(3)], name


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_nothing_outside_is_read(dtype: torch.dtype, device: torch.device) -> None:
    """Of targets that do not exist and labels far out; beyond each tensor lies guarded memory."""
    hostile = torch.tensor([-(2**31), -2, 5, 2**31 - 1, 9, 1])
    labels = torch.tensor([math.nan, math.inf, -math.inf, 3e9, -0.5])
    for sample in samples(ALIGNED, 30, device)[-1:]:
        (target,), (score,), _, (targets,) = sample.inputs[3:]  # type: ignore[misc]
        index = hostile.to(target.device)[torch.arange(target.numel()) % len(hostile)]
        targets = targets.clone()
        targets[0, :, 0] = labels.to(device)
        changed = with_inputs(
            sample,
            target=(index.view_as(target).to(dtype),),
            score=(torch.ones_like(score),),
            targets=(targets,),
        )
        expected = computed(changed, ALIGNED.reference)
        for side in ("before", "behind"):
            if device.type == "cpu":
                there = mapped(partial(guarded, side=side), changed.inputs)
                changed = Sample(there, changed.params)
            for a, b in zip(computed(changed), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_heads_of_other_levels(backend: str, device: torch.device) -> None:
    """As many anchors in all, but divided otherwise."""
    *_, sample = samples(ALIGNED, 150, device)

    def divided(levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        second = torch.cat(levels[3:], 1)
        return *levels[:3], *(x.contiguous() for x in second.split([3, 0, 147], 1))

    changes = {n: divided(sample.inputs[i]) for i, n in enumerate(PREDICTIONS)}  # type: ignore[arg-type]
    out, *_ = assert_exact(with_inputs(sample, **changes))
    torch.testing.assert_close(out, computed(sample)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_bins", [1, 2, 100, MAX_BINS + 1])
def test_any_number_of_bins(n_bins: int, backend: str, device: torch.device) -> None:
    sample, *_ = samples(ALIGNED, 12, device)
    distributions = tuple(
        torch.randn(*x.shape[:3], n_bins, device=device)
        for x in sample.inputs[1]  # type: ignore[union-attr]
    )
    changed = with_inputs(sample, distributions=distributions)
    if n_bins > MAX_BINS and backend == "triton":
        with pytest.raises(RuntimeError, match=f"up to {MAX_BINS} bins, got {n_bins}"):
            computed(changed)
    else:
        assert_exact(changed)
