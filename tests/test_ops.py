"""Every op of the registry, on both backends, against its reference in float64.

Nothing here names an op it could find in the registry: a new op is tested by being declared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from machine import CPU, INTERPRETED
from torch import Tensor
from trees import Unchanged

import detloss_triton as dt
from detloss_triton import backend as backends
from detloss_triton import engine, ops  # noqa: F401  (ops fills the registry)
from detloss_triton.engine import (
    REGISTRY,
    Call,
    DirectOp,
    Formula,
    Input,
    RowOp,
    Sample,
    Tile,
    cpu,
    formula,
    gpu,
    row_loss,
)

ROW_OPS = [each for each in REGISTRY.values() if isinstance(each, RowOp)]
SKIPPING_OPS = [each for each in ROW_OPS if each.skip]
DIRECT_OPS = [each for each in REGISTRY.values() if isinstance(each, DirectOp)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Ops that read no number that could be float64.
OF_INTEGERS = ("first_set", "denoising_map", "union_of_matches")
# What rounding in float32 may add to the reference's own error, relative to the largest value.
SLACK = 1e-5

# In its place where roundings can be counted: ulps of the largest value, or of the terms that an
# entry of a gradient is the sum of. Of equal boxes these terms cancel to 0, and their rounding is
# left: with products fused into sums, as on a GPU, halves of a tie do not round as the whole does.
# Counted for -log IoU, whose gradient takes most: a side has 1/2 ulp, an area 3/2, the union 6 (of
# three areas and two sums), and a quotient adds 2 to those of its parts: 19/2 for the IoU, 35/2 for
# IoU / union, 18 with 1 / union added to it, 23/2 for the slope 1 / IoU. Their product, times side,
# weight and upstream gradient, has 33 at worst.
ULPS = {"iou_loss": 33}
EPS = torch.finfo(torch.float32).eps

# Row shapes, and the `keep` values to test each with.
ROWS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), (0,)),  # a single row, without row dimensions
    ((7,), (0, 1)),
    ((2, 500), (1,)),  # several programs in each of several sums
    ((3, 15), (0, 1, 2)),
    ((0, 5), (0, 1, 2)),  # no image
    ((5, 0), (0, 1, 2)),  # images without rows
    ((2, 3, 4), (1, 2)),
]


def id_of(value: Any) -> str:
    name = getattr(value, "name", getattr(value, "__name__", str(value)))
    return name.removeprefix("torch.")


def over(*values: Any, name: str) -> pytest.MarkDecorator:
    """Parametrize by values that print as their name or shape."""
    return pytest.mark.parametrize(name, values, ids=id_of)


over_row_ops = over(*ROW_OPS, name="tested")
over_dtypes = over(*DTYPES, name="dtype")


def samples(tested: Formula, rows: int, device: torch.device, seed: int = 0) -> list[Any]:
    """The op's samples on the device: `Sample`s."""

    generator = torch.Generator().manual_seed(seed)
    return [s.changed(lambda x: x.to(device)) for s in tested.samples(rows, generator)]


def layouts(tested: Formula, rows: int, device: torch.device) -> list[Sample]:
    """One sample for each set of inputs that are there: what layout tests need, and quicker."""
    by_presence = {
        tuple(x is None for x in (*sample.inputs, sample.weight)): sample
        for sample in samples(tested, rows, device)
    }
    return list(by_presence.values())


def fullest(tested: Formula, rows: int, device: torch.device) -> Sample:
    """The sample with the most inputs."""
    return max(
        samples(tested, rows, device),
        key=lambda sample: sum(x is not None for x in (*sample.inputs, sample.weight)),
    )


def chosen(tested: Formula, rows: int, dtype: torch.dtype, device: torch.device) -> list[Sample]:
    """As much as a size and a dtype can tell apart: the interpreter takes seconds for the rest.

    Parameters and awkward rows are all there in 63 rows of float32; another dtype changes how each
    set of inputs is loaded and stored; more rows change only how sums are cut.
    """
    if rows == 600:
        return [fullest(tested, rows, device)]
    if dtype == torch.float32:
        return samples(tested, rows, device)
    return layouts(tested, rows, device)


def changed(sample: Sample, change: Callable[[Tensor], Tensor], weight: bool = True) -> Sample:
    """The sample with `change(x)` for every tensor that is there; both see rows first."""
    new = sample.changed(change)
    return new if weight else Sample(new.inputs, sample.params, sample.weight)


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    return changed(sample, lambda x: x.to(dtype) if x.is_floating_point() else x)


def reshaped(sample: Sample, rows: tuple[int, ...]) -> Sample:
    return changed(sample, lambda x: x.reshape((*rows, *x.shape[1:])))


def leaves_of(tested: RowOp, sample: Sample) -> list[Tensor | None]:
    """The inputs, those with a gradient as leaves of memory layout of their own."""
    return [
        x.detach().requires_grad_() if spec.grad and x is not None else x
        for x, spec in zip(sample.inputs, tested.inputs, strict=True)
    ]


def upstream_for(out: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(out.shape, generator=generator) * 2 - 0.5).to(out)


def computed(tested: RowOp, sample: Sample, keep: int = 0) -> list[Tensor]:
    """[output, *gradients] of the op under the backend that is set."""
    inputs = leaves_of(tested, sample)
    out = tested(*inputs, weight=sample.weight, keep=keep, **sample.params)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream_for(out))]


def new_gradients_by(layout: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """In place of `Call.new_gradients`: zeros, laid out so."""
    return lambda call, inputs, wanted: [
        layout(torch.zeros_like(x)) if want and x is not None else None
        for x, want in zip(inputs, wanted, strict=True)
    ]


def evaluated(module: Any, call: Call, sample: Sample) -> list[Tensor]:
    """[losses, *gradients] by `cpu` or `gpu`, whatever the size."""
    wanted = [
        spec.grad and x is not None for x, spec in zip(sample.inputs, call.op.inputs, strict=True)
    ]
    out, ready = module.forward(call, sample.weight, sample.inputs, wanted)
    dout = torch.ones_like(out)
    gradients = module.backward(call, sample.weight, sample.inputs, dout, wanted, ready)
    return [out, *(g for g in gradients if g is not None)]


def reference(tested: RowOp, sample: Sample, keep: int = 0) -> list[Tensor]:
    """[output, *gradients] of the bare reference, in the inputs' own precision."""
    inputs = leaves_of(tested, sample)
    losses = tested.reference(*inputs, **sample.params)
    losses = losses.sum(-1) if tested.by_entry else losses
    if sample.weight is not None:
        losses = losses * (sample.weight.unsqueeze(-1) if tested.values else sample.weight)
    n_rows = losses.dim() - bool(tested.values)
    out = losses.flatten(keep).sum(-1) if keep < n_rows and not tested.values else losses
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream_for(out))]


def beside(sample: Sample) -> Sample:
    """The sample with the first of two boxes moved off the other, where they are equal."""
    pred, *rest = sample.inputs
    assert pred is not None
    return Sample((pred * (1 + 2**-20), *rest), sample.params, sample.weight)


def assert_no_worse(
    names: list[str],
    ours: list[Tensor],
    peer: list[Tensor],
    truth: list[Tensor],
    slack: float = SLACK,
    terms: list[Tensor] | None = None,
) -> None:
    """abs(truth - ours) <= abs(truth - peer) + slack, entry by entry.

    The slack is a share of the largest value or of an entry's own terms, and the rounding to the
    dtype the result is stored in.
    """
    terms = truth if terms is None else terms
    for name, a, b, exact, term in zip(names, ours, peer, truth, terms, strict=True):
        assert a.shape == exact.shape, name
        assert a.isfinite().all(), f"{name} is not finite"
        if exact.numel() == 0:
            continue
        allowed = (b.double() - exact).abs() + slack * term.abs().clamp(min=exact.abs().max())
        if a.dtype != torch.float32:
            info = torch.finfo(a.dtype)
            # The interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest.
            half_steps = 2 if a.dtype == torch.bfloat16 and INTERPRETED else 1
            allowed += half_steps * (info.eps / 2 * exact.abs() + info.tiny * info.eps)
        error = (a.double() - exact).abs()
        excess = (error - allowed).max().item()
        worst = (error - allowed).argmax().item()
        assert excess <= 0, (
            f"{name}[{worst}]: {a.flatten()[worst].item()}, exact {exact.flatten()[worst].item()}, "
            f"allowed error {allowed.flatten()[worst].item()}"
        )


def result_names(tested: RowOp) -> list[str]:
    return ["out", *(f"d{spec.name}" for spec in tested.inputs if spec.grad)]


def assert_exact(tested: RowOp, rounded: Sample, keep: int) -> None:
    """The op under the backend that is set is as exact as its reference in float32."""
    ours = computed(tested, rounded, keep)
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [
        x.dtype for x in leaves_of(tested, rounded) if x is not None and x.requires_grad
    ]
    truth = reference(tested, cast(rounded, torch.float64), keep)
    peer = reference(tested, cast(rounded, torch.float32), keep)
    if tested.name not in ULPS:
        assert_no_worse(result_names(tested), ours, peer, truth)
        return
    # On either side of a tie a gradient is as large as the terms that cancel at it.
    terms = reference(tested, beside(cast(rounded, torch.float64)), keep)
    slack = ULPS[tested.name] * EPS
    assert_no_worse(result_names(tested), ours, peer, truth, slack, terms)


@over_row_ops
@over_dtypes
@over(
    0,
    1,
    63,  # a block of rows that is not full
    600,  # several programs, so partial sums
    name="rows",
)
def test_parity(
    tested: RowOp, dtype: torch.dtype, rows: int, backend: str, device: torch.device
) -> None:
    """Samples rounded to the dtype: sums, and for one size each row's own loss."""
    for sample in chosen(tested, rows, dtype, device):
        rounded = cast(sample, dtype)
        if rows != 63 or dtype == torch.float32:
            assert_exact(tested, rounded, keep=0)
        if rows == 63:
            assert_exact(tested, rounded, keep=1)


@over_row_ops
@pytest.mark.parametrize(("rows", "keeps"), ROWS, ids=str)
def test_row_dimensions(
    tested: RowOp,
    rows: tuple[int, ...],
    keeps: tuple[int, ...],
    backend: str,
    device: torch.device,
) -> None:
    """Sums over the trailing row dimensions only."""
    n_rows = math.prod(rows)
    for sample in chosen(tested, n_rows, torch.float16, device):
        for keep in keeps:
            assert_exact(tested, reshaped(sample, rows), keep)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@over(*DIRECT_OPS, name="tested")
@over_dtypes
@over(0, 1, 63, 600, name="rows")
def test_direct_parity(
    tested: DirectOp, dtype: torch.dtype, rows: int, backend: str, device: torch.device
) -> None:
    for sample in chosen(tested, rows, dtype, device):
        rounded = cast(sample, dtype)
        ours = outputs(tested(*rounded.inputs, **sample.params))
        truth = outputs(tested.reference(*cast(rounded, torch.float64).inputs, **sample.params))
        peer = outputs(tested.reference(*cast(rounded, torch.float32).inputs, **sample.params))
        for i, (a, b, exact) in enumerate(zip(ours, peer, truth, strict=True)):
            if exact.is_floating_point():
                assert_no_worse([f"out{i}"], [a], [b], [exact])
            else:
                assert torch.equal(a, exact)


@over_row_ops
def test_float64_is_computed_in_float64(tested: RowOp, device: torch.device) -> None:
    sample = cast(samples(tested, 63, device)[0], torch.float64)
    with backends.use_backend("torch"):
        ours = computed(tested, sample)
    assert all(x.dtype == torch.float64 for x in ours)
    torch.testing.assert_close(ours, reference(tested, sample), rtol=1e-12, atol=1e-12)


# But for `first_set`: a mask has no precision.
@over(*(op for op in REGISTRY.values() if op.name not in OF_INTEGERS), name="tested")
@pytest.mark.usefixtures("kernels")
def test_kernels_refuse_float64(tested: Formula, device: torch.device) -> None:
    sample = cast(samples(tested, 8, device)[0], torch.float64)
    with (
        backends.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' was requested.*float64"),
    ):
        tested(*sample.inputs, **sample.params)


@over_row_ops
def test_gradients_are_those_asked_for(tested: RowOp, backend: str, device: torch.device) -> None:
    """Every combination of inputs that require a gradient, each the same as in all together."""
    differentiable = [i for i, spec in enumerate(tested.inputs) if spec.grad]
    for sample in layouts(tested, 40, device):
        _, *expected = computed(tested, sample)
        for asked in itertools.product((False, True), repeat=len(differentiable)):
            inputs = leaves_of(tested, sample)
            for i, wanted in zip(differentiable, asked, strict=True):
                inputs[i].requires_grad_(wanted)
            out = tested(*inputs, weight=sample.weight, **sample.params)
            assert out.requires_grad == any(asked)
            if any(asked):
                out.backward(upstream_for(out))
            for i, wanted, gradient in zip(differentiable, asked, expected, strict=True):
                if wanted:
                    assert torch.equal(inputs[i].grad, gradient)
                else:
                    assert inputs[i].grad is None


@over_row_ops
def test_again_is_bitwise_the_same(tested: RowOp, backend: str, device: torch.device) -> None:
    """A second forward, and a second backward through the first one's graph."""
    for sample in layouts(tested, 300, device):
        inputs = leaves_of(tested, sample)
        out = tested(*inputs, weight=sample.weight, **sample.params)
        again = tested(*inputs, weight=sample.weight, **sample.params)
        assert torch.equal(out, again)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        up = upstream_for(out)
        first = torch.autograd.grad(out, wanted, up, retain_graph=True)
        second = torch.autograd.grad(out, wanted, up)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@over_row_ops
def test_inputs_are_left_alone(tested: RowOp, backend: str, device: torch.device) -> None:
    for sample in layouts(tested, 63, device):
        with Unchanged([*sample.inputs, sample.weight]):
            computed(tested, sample)


@over(*DIRECT_OPS, name="tested")
def test_direct_ops_leave_inputs_alone_and_carry_no_gradient(
    tested: DirectOp, backend: str, device: torch.device
) -> None:
    for sample in samples(tested, 63, device):
        inputs = engine.mapped(
            lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), sample.inputs
        )
        with Unchanged(inputs):
            out = outputs(tested(*inputs, **sample.params))
        assert not any(x.requires_grad for x in out)


@over(*REGISTRY.values(), name="tested")
@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(
    tested: Formula, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh memory holds NaN here, which any result left unwritten or read too early would show."""
    monkeypatch.setattr(cpu, "ELEMENTS", 16)
    monkeypatch.setattr(cpu, "MANY", 0)
    for sample in layouts(tested, 63, device):
        if isinstance(tested, RowOp):
            for keep in (0, 1):
                assert all(x.isfinite().all() for x in computed(tested, sample, keep))
        else:
            out = outputs(tested(*sample.inputs, **sample.params))
            assert all(x.isfinite().all() for x in out)
            # Whole numbers left unwritten are as large as their type allows.
            assert all(
                x.long().abs().max() < 2**31 for x in out if not x.is_floating_point() and x.numel()
            )


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal up to the order of sums and the width of vector instructions."""
    for a, b in zip(ours, theirs, strict=True):
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=SLACK * largest)


def channels_first(x: Tensor) -> Tensor:
    """(N, h * w, features) as a view of (N, features, h, w) memory; (N, h * w) as it is."""
    if x.dim() == 2:
        return x
    n, cells, features = x.shape
    stored = x.transpose(1, 2).reshape(n, features, 6, cells // 6).contiguous()
    return stored.flatten(2).transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    """The same values, each dimension stored with a gap after every entry."""
    stored = x.new_zeros([2 * n for n in x.shape])
    view = stored[(slice(None, None, 2),) * x.dim()]
    view.copy_(x)
    return view


@over_row_ops
@over(channels_first, every_other, name="layout")
def test_strided_inputs(
    tested: RowOp,
    layout: Callable[[Tensor], Tensor],
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Views are read in place, and their gradients are those of contiguous inputs."""
    monkeypatch.setattr(gpu, "_run_contiguous", None)
    for sample in layouts(tested, 2 * 24, device):
        plain = reshaped(sample, (2, 24))
        for keep in (0, 1):
            ours = computed(tested, changed(plain, layout), keep)
            close(ours, computed(tested, plain, keep))


@over_row_ops
def test_gradients_flow_into_the_stored_tensor(
    tested: RowOp, backend: str, device: torch.device
) -> None:
    """The gradient of an (N, C, H, W) leaf seen as (N, H * W, C) rows."""
    sample = reshaped(samples(tested, 3 * 24, device)[0], (3, 24))
    views = changed(sample, channels_first)
    stored = [
        x.detach().transpose(1, 2).unflatten(2, (6, 4)).clone().requires_grad_()
        if spec.grad and x is not None
        else x
        for x, spec in zip(views.inputs, tested.inputs, strict=True)
    ]
    seen = [
        x.flatten(2).transpose(1, 2) if spec.grad and x is not None else x
        for x, spec in zip(stored, tested.inputs, strict=True)
    ]
    out = tested(*seen, weight=views.weight, keep=1, **sample.params)
    out.backward(upstream_for(out))
    gradients = [
        x.grad.flatten(2).transpose(1, 2)
        for x, spec in zip(stored, tested.inputs, strict=True)
        if spec.grad and x is not None
    ]
    close([out.detach(), *gradients], computed(tested, sample, keep=1))


@over_row_ops
@over(0, 1, name="axis")
def test_expanded_inputs(tested: RowOp, axis: int, backend: str, device: torch.device) -> None:
    """Inputs of stride 0, each in turn and all at once, differentiable ones too."""
    shape = [2, 12]
    shape[axis] = 1
    for sample in layouts(tested, math.prod(shape), device):
        one = reshaped(sample, tuple(shape))
        wide = changed(one, lambda x: x.expand(2, 12, *x.shape[2:]))
        full = changed(wide, lambda x: x.contiguous())
        expected = computed(tested, full, keep=1)
        close(computed(tested, wide, keep=1), expected)
        for i in range(len(one.inputs)):
            mixed = (*full.inputs[:i], wide.inputs[i], *full.inputs[i + 1 :])
            close(computed(tested, Sample(mixed, sample.params, full.weight), keep=1), expected)
        if wide.weight is not None:
            only = Sample(full.inputs, sample.params, wide.weight)
            close(computed(tested, only, keep=1), expected)


@over_row_ops
def test_gradients_of_an_expanded_leaf_add_up(
    tested: RowOp, backend: str, device: torch.device
) -> None:
    sample = samples(tested, 5, device)[0]
    inputs = leaves_of(tested, sample)
    wide = [None if x is None else x.expand(7, *x.shape) for x in inputs]
    weight = None if sample.weight is None else sample.weight.expand(7, 5)
    tested(*wide, weight=weight, **sample.params).sum().backward()
    alone = leaves_of(tested, sample)
    tested(*alone, weight=sample.weight, **sample.params).sum().backward()
    for one, many in zip(alone, inputs, strict=True):
        if one is not None and one.requires_grad:
            close([many.grad], [7 * one.grad])


@over_row_ops
def test_rows_that_no_two_strides_can_walk(
    tested: RowOp, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three row dimensions in reverse order in memory: copied, and still exact."""
    copied: list[bool] = []
    run_contiguous = gpu._run_contiguous

    def counted(*args: Any) -> Tensor:
        copied.append(True)
        return run_contiguous(*args)

    monkeypatch.setattr(gpu, "_run_contiguous", counted)
    for sample in layouts(tested, 2 * 3 * 4, device):
        plain = reshaped(sample, (2, 3, 4))
        turned = changed(plain, lambda x: x.transpose(0, 2).contiguous().transpose(0, 2))
        for keep in (0, 1):
            copied.clear()
            ours = computed(tested, turned, keep)
            assert bool(copied) == (backend == "triton")
            close(ours, computed(tested, plain, keep))


@over_row_ops
def test_upstream_gradients_of_any_layout(
    tested: RowOp, backend: str, device: torch.device
) -> None:
    """Gradients of the output that are expanded, transposed, or zero for a part of it."""
    sample = reshaped(samples(tested, 24, device)[0], (4, 6))
    inputs = leaves_of(tested, sample)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    out = tested(*inputs, weight=sample.weight, keep=2, **sample.params)
    up = upstream_for(out)
    expected = torch.autograd.grad(out, wanted, up, retain_graph=True)
    turned = up.transpose(0, 1).contiguous().transpose(0, 1)
    close(list(torch.autograd.grad(out, wanted, turned, retain_graph=True)), list(expected))
    of_ones = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
    close(list(torch.autograd.grad(out.sum(), wanted, retain_graph=True)), list(of_ones))
    of_part = torch.autograd.grad(out[1:].sum(), wanted)
    for gradient, whole in zip(of_part, of_ones, strict=True):
        assert not gradient[0].any()
        close([gradient[1:]], [whole[1:]])


@over_row_ops
def test_mixed_dtypes(tested: RowOp, backend: str, device: torch.device) -> None:
    """Each input in a dtype of its own, as under autocast: gradients come back in it."""
    mixed = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    for sample in layouts(tested, 63, device):
        rounded = changed(sample, lambda x: x.to(next(mixed)) if x.is_floating_point() else x)
        assert_exact(tested, rounded, keep=0)


@over_row_ops
def test_autocast_changes_nothing(tested: RowOp, backend: str, device: torch.device) -> None:
    sample = cast(samples(tested, 63, device)[0], torch.bfloat16)
    expected = computed(tested, sample)
    with torch.autocast(device.type, torch.bfloat16):
        ours = computed(tested, sample)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@over(*SKIPPING_OPS, name="tested")
def test_rows_of_weight_zero_add_exactly_nothing(
    tested: RowOp, backend: str, device: torch.device
) -> None:
    """Whatever they hold: a box that was never predicted may be NaN, infinite or inside out."""
    for sample in samples(tested, 64, device):
        weight = torch.arange(64, device=device).remainder(3).float()
        unused = weight == 0
        rubbish = torch.tensor([math.nan, math.inf, -math.inf, 1e38], device=device)

        def spoilt(x: Tensor, unused: Tensor = unused, rubbish: Tensor = rubbish) -> Tensor:
            if not x.is_floating_point():
                return x
            place = torch.arange(x.shape[-1], device=device) % 4
            rows = unused if x.dim() == 1 else unused.unsqueeze(-1)
            return torch.where(rows, rubbish[place], x)

        clean = Sample(sample.inputs, sample.params, weight)
        dirty = Sample(changed(sample, spoilt, weight=False).inputs, sample.params, weight)
        for keep in (0, 1):
            expected, ours = computed(tested, clean, keep), computed(tested, dirty, keep)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
            assert not any(gradient[unused].any() for gradient in ours[1:])


@over_row_ops
def test_blocks_equal_the_whole(tested: RowOp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU in blocks of a few rows, in every row shape, against one piece."""
    monkeypatch.setattr(cpu, "ELEMENTS", 48)
    with backends.use_backend("torch"):
        for rows, keeps in ROWS:
            if rows == () or not 0 < math.prod(rows) < 100:
                continue
            for sample in samples(tested, math.prod(rows), CPU):
                for keep in keeps:
                    shaped = reshaped(sample, rows)
                    monkeypatch.setattr(cpu, "pays", lambda call, inputs: False)
                    whole = computed(tested, shaped, keep)
                    monkeypatch.setattr(cpu, "pays", lambda call, inputs: True)
                    close(computed(tested, shaped, keep), whole)


@over(*SKIPPING_OPS, name="tested")
def test_few_rows_of_weight_are_evaluated_by_themselves(
    tested: RowOp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a CPU: the reference sees no other row, and a second backward finds the same again."""
    seen: list[int] = []
    reference = tested.reference

    def counted(*args: Any, **params: Any) -> Tensor:
        seen.append(args[0].shape[: args[0].dim() - tested.inputs[0].features].numel())
        return reference(*args, **params)

    monkeypatch.setattr(cpu, "pays", lambda call, inputs: True)
    sample = reshaped(fullest(tested, 60, CPU), (3, 20))
    weight = torch.arange(60.0).reshape(3, 20) * (torch.arange(20.0) % 7 == 2)
    sample = Sample(sample.inputs, sample.params, weight)
    n_used = int((weight != 0).sum())
    with backends.use_backend("torch"):
        for keep in (0, 1, 2):
            inputs = leaves_of(tested, sample)
            leaves = [x for x in inputs if x is not None and x.requires_grad]
            with monkeypatch.context() as patch:
                patch.setattr(tested, "reference", counted)
                seen.clear()
                out = tested(*inputs, weight=weight, keep=keep, **sample.params)
                found = [
                    torch.autograd.grad(out, leaves, upstream_for(out), retain_graph=True)
                    for _ in range(2)
                ]
                assert seen and set(seen) == {n_used}
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "pays", lambda call, inputs: False)
                close([out.detach(), *found[0]], computed(tested, sample, keep))


@over_row_ops
def test_background_is_the_reference_without_a_class(tested: RowOp) -> None:
    """The short way of a CPU, and its slope, beside the reference and autograd's."""
    if tested.background is None:
        pytest.skip("has no rows without a class")
    for sample in samples(tested, 30, CPU):
        logits, mask = sample.inputs[0], sample.inputs[3]
        assert logits is not None
        leaf = logits.double().requires_grad_()
        none = torch.full(logits.shape[:-1], -1)
        expected = tested.reference(leaf, none, None, mask, **sample.params)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        found = tested.background(logits.double(), mask, **sample.params)
        for ours, exact in zip(found, (expected, slope), strict=True):
            torch.testing.assert_close(ours, exact.detach(), rtol=1e-12, atol=1e-12)


def test_blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut along whole trailing dimensions; every row once, in any row shape."""
    narrow: Any = SimpleNamespace(temporaries=1)
    monkeypatch.setattr(cpu, "ELEMENTS", 48)
    for rows in ((13,), (3, 15), (2, 3, 4), (40, 2, 2)):
        x = torch.zeros(*rows, 5)
        seen = torch.zeros(rows)
        for index in cpu._blocks(Call(narrow, (), 0, x.shape[:-1]), (x, None)):
            seen[index] += 1
            assert x[index].numel() < 2 * 48
        assert seen.eq(1).all()


def test_large_inputs_are_cut_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *a: runs.append(True) or forward(*a))
    boxes = torch.rand(20, 4, requires_grad=True)
    ciou = next(op for op in ROW_OPS if op.name == "ciou_loss")
    monkeypatch.setattr(cpu, "MANY", 64 * ciou.temporaries)
    with backends.use_backend("torch"):
        ciou(boxes[:16], boxes[:16].detach(), eps=1e-7, alpha_grad=True)
        assert not runs
        ciou(boxes, boxes.detach(), eps=1e-7, alpha_grad=True)
        assert runs
        runs.clear()
        monkeypatch.setattr(backends, "is_cpu", lambda device: False)
        ciou(boxes, boxes.detach(), eps=1e-7, alpha_grad=True)
        assert not runs


def test_no_gradient_is_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is found in forward: not where nobody will ask for it."""
    monkeypatch.setattr(cpu, "MANY", 0)
    allocated: list[bool] = []
    new = Call.new_gradients

    def counted(call: Call, inputs: Any, wanted: Any) -> Any:
        gradients = new(call, inputs, wanted)
        allocated.extend(True for g in gradients if g is not None)
        return gradients

    monkeypatch.setattr(Call, "new_gradients", counted)
    logits = torch.rand(20, 4, requires_grad=True)
    focal = REGISTRY["sigmoid_focal"]
    with backends.use_backend("torch"):
        with torch.no_grad():
            focal(logits, None, torch.rand(20), None, alpha=0.25, gamma=2.0)
        assert not allocated
        focal(logits, None, torch.rand(20), None, alpha=0.25, gamma=2.0)
        assert allocated


# Where a reference holds a factor constant, its gradient is not the slope of its value: test_losses
# compares these with formulas.
HOLDS_A_CONSTANT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "varifocal": lambda params: params["gamma"] != 0,
    "matchability": lambda params: params["gamma"] != 0,
    "iou_aware": lambda params: params["alpha"] != 0,
    "ciou_loss": lambda params: not params["alpha_grad"],
}


def smooth(tested: RowOp) -> Iterator[Sample]:
    """The rows after a sample's awkward ones, which sit on kinks, in float64."""
    for sample in samples(tested, 18, CPU):
        if not HOLDS_A_CONSTANT.get(tested.name, lambda params: False)(sample.params):
            yield cast(changed(sample, lambda x: x[-6:]), torch.float64)


@over_row_ops
def test_gradcheck(tested: RowOp) -> None:
    """Autograd's gradient of the reference is the slope of its value."""
    checked = 0
    for sample in smooth(tested):
        inputs = leaves_of(tested, sample)
        places = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]

        def function(
            *leaves: Tensor, inputs: Any = inputs, places: Any = places, params: Any = sample.params
        ) -> Tensor:
            full = list(inputs)
            for i, x in zip(places, leaves, strict=True):
                full[i] = x
            return tested.reference(*full, **params).sum()

        assert torch.autograd.gradcheck(function, [inputs[i] for i in places])
        checked += 1
    assert checked


@over(("sigmoid_focal", "alpha", "gamma"), ("quality_focal", None, "beta"), name="loss")
@over(0.0, 0.5, 1.0, 1.5, 2.0, name="exponent")
def test_background_has_the_slope_of_its_value(
    loss: tuple[str, str | None, str], exponent: float
) -> None:
    """It brings its derivative along: also where p is 0 and that of p^0.5 is infinite."""
    name, balance, power = loss
    tested = REGISTRY[name]
    params = {power: exponent} | ({balance: 0.25} if balance else {})
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 4, generator=generator)

    assert isinstance(tested, RowOp) and tested.background is not None
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    step = 1e-6
    for here in (None, mask.double()):
        _, slopes = tested.background(logits, here, **params)
        above, below = (tested.background(logits + d, here, **params)[0] for d in (step, -step))
        torch.testing.assert_close((above - below) / (2 * step), slopes, rtol=1e-6, atol=1e-8)
    losses, slopes = tested.background(torch.tensor([[-200.0, -math.inf]]), None, **params)
    assert not losses.any() and not slopes.any()


# The class ops, recognised by their inputs: extreme logits and labels that are no class.
CLASS_OPS = [each for each in ROW_OPS if each.inputs[0].name == "logits"]


@over(*CLASS_OPS, name="tested")
@over(torch.float32, torch.float16, name="dtype")
def test_extreme_logits_are_finite(
    tested: RowOp, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    extremes = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device)
    logits = torch.cartesian_prod(extremes, extremes, extremes)
    label = torch.arange(len(logits), device=device) % 4
    for sample in samples(tested, len(logits), device):
        inputs = [
            logits if spec.name == "logits" else label if spec.name in ("label", "left") else x
            for x, spec in zip(sample.inputs, tested.inputs, strict=True)
        ]
        if inputs[1] is None or sample.inputs[1] is None:
            inputs[:2] = [logits[:, :1], None]
        inputs = [
            x[:, :1].expand_as(inputs[0]) if x is not None and spec.name == "mask" else x
            for x, spec in zip(inputs, tested.inputs, strict=True)
        ]
        rounded = cast(Sample(tuple(inputs), sample.params, sample.weight), dtype)
        assert_exact(tested, rounded, keep=1)


@over(*CLASS_OPS, name="tested")
@over(torch.int64, torch.int32, name="dtype")
def test_labels_that_are_no_class(
    tested: RowOp, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Any index outside [0, C) counts as background, far outside too: nothing else is touched."""
    background = torch.iinfo(dtype)
    labels = [-1, -100, 3, 4, 255, 2**16, background.min, background.max]
    if dtype == torch.int64:
        labels += [2**32, 2**32 + 1, -(2**32) + 2]
    far = torch.tensor(labels, dtype=dtype, device=device)
    near = torch.full_like(far, -1)
    for sample in samples(tested, len(far), device):
        if sample.inputs[1] is None:
            continue
        logits = torch.randn(len(far), 3, device=device)
        rest = [
            x[:, :1].expand_as(logits) if x is not None and x.dim() == 2 else x
            for x in sample.inputs[2:]
        ]
        ours = computed(tested, Sample((logits, far, *rest), sample.params))
        expected = computed(tested, Sample((logits, near, *rest), sample.params))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_registry_is_complete() -> None:
    assert len(REGISTRY) >= 14
    for name, each in REGISTRY.items():
        assert each.name == name
        assert each.launcher is not None, f"{name} has no launcher"
        assert each.__doc__, f"{name} has no docstring"
        for rows in (0, 1, 63):
            generated = list(each.samples(rows, torch.Generator().manual_seed(0)))
            assert generated, f"{name} has no samples"
            if isinstance(each, RowOp):
                assert all(x.shape[0] == rows for s in generated for x in s.inputs if x is not None)


def test_every_op_is_documented() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/**/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    missing = [name for name in REGISTRY if name not in text]
    assert not missing, f"README.md and docs/ do not name {missing}"


def no_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    yield from ()


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formula, "REGISTRY", {})


@pytest.mark.usefixtures("own_registry")
def test_other_forms_are_given_the_arguments_by_name() -> None:
    @row_loss(Input("pred", features=1, grad=True), samples=no_samples)
    def half_square(pred: Tensor, scale: float) -> Tensor:
        return scale * pred.square().sum(-1)

    @half_square.triton
    def launcher(given: Any) -> Tile:
        return Tile(None, rows=int(given.scale), constants={"PRED": given.pred})

    pred = torch.zeros(2, 3)
    tile = launcher(half_square.given(pred, scale=4.0))
    assert half_square.launcher is launcher
    assert tile.rows == 4 and tile.constants["PRED"] is pred


@pytest.mark.usefixtures("own_registry")
def test_an_op_is_declared_once_and_with_its_inputs_first() -> None:
    def square(pred: Tensor) -> Tensor:
        return pred.square().sum(-1)

    row_loss(Input("pred", features=1, grad=True), samples=no_samples)(square)
    with pytest.raises(TypeError, match="'square' is declared twice"):
        row_loss(Input("pred", features=1, grad=True), samples=no_samples)(square)
    square.__name__ = "squared"
    with pytest.raises(TypeError, match=r"squared: .*\['pred'\]"):
        row_loss(Input("target", features=1), samples=no_samples)(square)


def test_arguments_are_checked_before_anything_runs(backend: str, device: torch.device) -> None:
    giou, bce = REGISTRY["giou_loss"], REGISTRY["binary_cross_entropy"]
    boxes = torch.zeros(3, 4, device=device)
    logits = torch.zeros(3, 2, device=device)
    score = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match=r"giou_loss: expected the inputs \(pred, target\), got 1"):
        giou(boxes, eps=1e-6)
    with pytest.raises(ValueError, match="giou_loss: target is required, got None"):
        giou(boxes, None, eps=1e-6)
    with pytest.raises(ValueError, match=r"target has rows \(2,\), expected \(3,\) as in pred"):
        giou(boxes, boxes[:2], eps=1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \(2,\), expected \(3,\)"):
        giou(boxes, boxes, weight=score[:2], eps=1e-6)
    with pytest.raises(ValueError, match="no gradient is defined for weight"):
        giou(boxes, boxes, weight=score.clone().requires_grad_(), eps=1e-6)
    with pytest.raises(ValueError, match="no gradient is defined for score"):
        bce(logits, None, score.clone().requires_grad_(), None)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 2"):
        giou(boxes, boxes, keep=2, eps=1e-6)
    with pytest.raises(ValueError, match=r"pred needs a last dimension, got shape \(\)"):
        giou(score[0], score[0], eps=1e-6)


CLASS_OPS = (
    "binary_cross_entropy",
    "sigmoid_focal",
    "quality_focal",
    "varifocal",
    "matchability",
    "iou_aware",
)


@pytest.mark.parametrize("name", CLASS_OPS)
def test_what_a_trained_model_loses_is_not_lost_in_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label's logit is high and the others low: the loss is tiny beside what it is made of."""
    monkeypatch.setattr(cpu, "ELEMENTS", 2**12)
    monkeypatch.setattr(cpu, "MANY", 0)
    op = REGISTRY[name]
    assert isinstance(op, RowOp)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 400, (2, 300), generator=generator)
    logits = torch.randn(2, 300, 20, generator=generator) / 2 - 8
    logits[torch.arange(20) == label.unsqueeze(-1)] = 4.0
    params = next(op.samples(8, generator)).params
    for keep in (0, 1, 2):
        loss = op(logits, label, None, None, keep=keep, **params)
        exact = op(logits.double(), label, None, None, keep=keep, **params)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name, op in REGISTRY.items() if isinstance(op, RowOp)])
def test_second_derivatives_do_not_depend_on_the_size(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are autograd's, also where blocks have found the first."""
    op = REGISTRY[name]
    assert isinstance(op, RowOp)
    sample = next(op.samples(64, torch.Generator().manual_seed(0)))

    def second() -> Tensor:
        factor = torch.ones((), requires_grad=True)
        first, *others = sample.inputs
        assert first is not None
        x = first.clone().requires_grad_()
        out = op(x * factor, *others, weight=sample.weight, **sample.params)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), factor)[0]

    whole = second()
    monkeypatch.setattr(cpu, "ELEMENTS", 64)
    monkeypatch.setattr(cpu, "MANY", 0)
    torch.testing.assert_close(second(), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("kernels")
def test_kernels_show_nan_where_the_references_do(device: torch.device) -> None:
    """It is how a `GradScaler` learns that a step is to be skipped."""
    nan = math.nan
    coder = dt.DeltaXYWHBBoxCoder(add_ctr_clamp=True)
    with device:
        deltas = torch.tensor([[0.0, 0.0, nan, 0.0]])
        anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, nan, 1.0], [0.0, 1.0, 2.0]])
    found = []
    for chosen in ("torch", "triton"):
        with dt.use_backend(chosen):  # type: ignore[arg-type]
            losses = REGISTRY["distillation"](student, teacher, keep=1, temperature=5.0)
            found.append([coder.decode(anchors, deltas), losses])
    for ours, theirs in zip(*found, strict=True):
        assert ours.isnan().any() and ours.isnan().equal(theirs.isnan())
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    with device:
        logits, label = torch.randn(5, 3), torch.tensor([0, 3, 2, 5, 1])
    focal = dt.CrossSigmoidFocalLoss()
    assert focal(logits, label.to(dtype)) == focal(logits, label)


def test_tensors_of_several_devices_are_refused() -> None:
    elsewhere = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="sigmoid_focal: all tensors must be on one device"):
        REGISTRY["sigmoid_focal"](torch.zeros(2, 3), elsewhere, None, None, alpha=0.25, gamma=2.0)
    with pytest.raises(
        ValueError, match=r"CrossSigmoidFocalLoss: targets must be on cpu .* got meta"
    ):
        dt.CrossSigmoidFocalLoss()(torch.zeros(2, 3), elsewhere)
