"""The fused ops over queries: both backends against float64, and what they may not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import guarded
from torch import Tensor

from detloss_triton import backend as backends
from detloss_triton import ops  # noqa: F401  (fills the registry)
from detloss_triton.engine import REGISTRY, FusedOp, Sample, mapped, tensors_of

OPS: list[Any] = [REGISTRY["queries"], REGISTRY["localisation"]]
over_ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ROWS = 6


def samples_of(op: FusedOp, device: torch.device, rows: int = ROWS, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [s.changed(lambda x: x.to(device)) for s in op.samples(rows, generator)]


def with_input(op: FusedOp, sample: Sample, **changes: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with some of its inputs changed, by name."""
    inputs = tuple(
        mapped(changes[name], given) if name in changes else given
        for name, given in zip(op.inputs, sample.inputs, strict=True)
    )
    return Sample(inputs, sample.params)


def of_layers(op: FusedOp, sample: Sample) -> list[list[Tensor]]:
    """The tensors of each input that has a gradient."""
    given = dict(zip(op.inputs, sample.inputs, strict=True))
    return [list(given[name]) for name in op.gradients]


def evaluated(
    op: FusedOp, sample: Sample, wanted: Callable[[int], bool] = lambda i: True
) -> tuple[Tensor, list[Tensor | None]]:
    """(losses, the gradients of their mix by each tensor that has one, where wanted)."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_(wanted(len(leaves))))
        return leaves[-1]

    changed = with_input(op, sample, **dict.fromkeys(op.gradients, leaf))
    out = op(*changed.inputs, **changed.params)
    if out.requires_grad:
        (out * torch.arange(1, len(out) + 1, device=out.device)).sum().backward()
    # What no term is of has no gradient in the reference, and zeros from a kernel.
    return out.detach(), [
        torch.zeros_like(x) if x.grad is None and x.requires_grad else x.grad for x in leaves
    ]


def expected_of(op: FusedOp, sample: Sample) -> tuple[Tensor, list[Tensor | None]]:
    """As `evaluated`, in float64."""
    double = sample.changed(lambda x: x.double() if x.is_floating_point() else x)
    with backends.use_backend("torch"):
        return evaluated(op, double)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    (losses, gradients), (true_losses, true_gradients) = found, expected
    assert len(gradients) == len(true_gradients) > 0
    for x, y in zip((losses, *gradients), (true_losses, *true_gradients), strict=True):
        scale = max(float(y.abs().max()), 1e-3) if y.numel() else 1.0
        torch.testing.assert_close(x.double(), y, rtol=0, atol=tolerance * scale, equal_nan=True)


def transposed(x: Tensor) -> Tensor:
    """Features before queries in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def behind_others(x: Tensor) -> Tensor:
    """Queries behind three of another kind."""
    return torch.cat([x.new_full((len(x), 3, x.shape[2]), float("nan")), x], 1)[:, 3:]


def image_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@over_ops
@pytest.mark.parametrize("layout", [behind_others, image_last])
def test_layouts(
    op: FusedOp,
    layout: Callable[[Tensor], Tensor],
    backend: str,
    device: torch.device,
    poisoned_memory: None,
) -> None:
    """Of every second layer: those of other layouts are copied."""
    seen: list[Tensor] = []

    def strided(x: Tensor) -> Tensor:
        seen.append(x)
        return layout(x) if len(seen) % 2 else x

    for sample in samples_of(op, device)[:1]:
        changed = with_input(op, sample, **dict.fromkeys(op.levels, strided))
        rest = [name for name in op.inputs if name in ("matches", "union", "targets")]
        turned = with_input(op, changed, **dict.fromkeys(rest, transposed))
        assert_close(evaluated(op, turned), expected_of(op, sample), 2e-5)


@over_ops
@pytest.mark.parametrize("matches", ["none", "hostile"])
def test_without_pairs(
    op: FusedOp, matches: str, backend: str, device: torch.device, poisoned_memory: None
) -> None:
    """No query is matched, or all with targets that do not exist: no box is ever looked at."""

    def unmatched(x: Tensor) -> Tensor:
        wild = torch.tensor([-1, -(2**62), 2**62, 5, 2**31, -(2**31)], device=x.device)
        return (
            torch.full_like(x, -1)
            if matches == "none"
            else wild[torch.arange(x.numel()) % 6].view(x.shape)
        )

    def nan(x: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"))

    changes = {
        "matches": unmatched,
        "union": unmatched,
        "targets": nan,
        "boxes": nan,
        "points": nan,
    }
    for sample in samples_of(op, device)[:2]:
        given = with_input(op, sample, **{k: v for k, v in changes.items() if k in op.inputs})
        losses, gradients = evaluated(op, given)
        assert losses.isfinite().all()
        assert all(g.isfinite().all() for g in gradients if g is not None)
        if op.name == "queries":
            boxes = gradients[len(given.inputs[0]) :]
            assert not any(g.any() for g in boxes if g is not None)
        plain = dict.fromkeys(("matches", "union"), lambda x: torch.full_like(x, -1))
        same = with_input(op, sample, **{k: v for k, v in plain.items() if k in op.inputs})
        assert_close((losses, gradients), expected_of(op, same), 2e-5)


@over_ops
def test_rows_that_carry_no_term_may_hold_anything(
    op: FusedOp, backend: str, device: torch.device, poisoned_memory: None
) -> None:
    names = [name for name in ("boxes", "points") if name in op.inputs]
    for sample in samples_of(op, device)[:2]:
        given = dict(zip(op.inputs, sample.inputs, strict=True))
        n_targets = given["targets"][0].shape[1]
        maps = [m for name in ("matches", "union") for m in given.get(name, ())]
        used = torch.stack([((m >= 0) & (m < n_targets)).any(0) for m in maps]).any(0)
        unused = ~used.unsqueeze(-1)

        def blanked(x: Tensor, unused: Tensor = unused) -> Tensor:
            return x.masked_fill(unused, float("nan"))

        changed = with_input(op, sample, **dict.fromkeys(names, blanked))
        for x, y in zip(
            tensors_of(evaluated_as_given(op, changed)),
            tensors_of(evaluated_as_given(op, sample)),
            strict=True,
        ):
            assert torch.equal(x, y)


def evaluated_as_given(op: FusedOp, sample: Sample) -> tuple[Any, ...]:
    losses, gradients = evaluated(op, sample)
    return losses, tuple(gradients)


@over_ops
def test_nan_reaches_its_own_layer_only(op: FusedOp, backend: str, device: torch.device) -> None:
    """NaN in a term shows, as in the reference, and in no other layer."""
    sample = samples_of(op, device)[0]
    matched = with_input(op, sample, matches=lambda m: torch.zeros_like(m))
    for name in op.levels:
        seen: list[Tensor] = []

        def spoiled(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            x = x.clone()
            x[1, :, 0] = float("nan")
            return x if len(seen) == 2 else x.nan_to_num(0.5)

        given = with_input(op, matched, **{name: spoiled})
        if name == "scores":
            given = with_input(op, given, matches=lambda m: torch.full_like(m, -1))
        losses, _ = evaluated(op, given)
        expected, _ = expected_of(op, given)
        assert expected.isnan().any() and not expected.isnan().all(), name
        assert torch.equal(losses.isnan(), expected.isnan()), name


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@over_ops
@pytest.mark.parametrize("side", ["before", "behind"])
def test_nothing_is_read_beyond_its_memory(
    op: FusedOp, side: Any, backend: str, device: torch.device
) -> None:
    """Guard pages around each input: one element beyond ends the process."""
    if device.type != "cpu":
        pytest.skip("guard pages are the host's")
    for sample in samples_of(op, device)[:1]:
        wild = with_input(op, sample, matches=lambda m: torch.where(m > 3, 2**40, m))
        placed = wild.changed(lambda x: guarded(x, side))
        for x, y in zip(
            tensors_of(evaluated_as_given(op, placed)),
            tensors_of(evaluated_as_given(op, wild)),
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@over_ops
def test_two_launches_forward_and_one_backward(
    op: FusedOp, backend: str, device: torch.device
) -> None:
    for sample in samples_of(op, device):
        with backends.record_launches() as launches:
            evaluated(op, sample)
        assert len(launches) == 3


def test_shares_are_those_of_the_reference(backend: str, device: torch.device) -> None:
    op: Any = REGISTRY["distillation_shares"]
    for rows in (0, 3, 5000):
        generator = torch.Generator().manual_seed(0)
        for sample in op.samples(rows, generator):
            own, union, like = (x.to(device) for x in sample.inputs)
            found = op(own, union, like, **sample.params)
            expected = op.reference(own, union, like.double(), **sample.params)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
