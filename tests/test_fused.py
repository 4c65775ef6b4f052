"""Fused ops, on both backends, against their references in float64: a new one is tested by being
declared. What the small ops are tested for, of all tensors of a criterion at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import NAMES, assert_same, case
from machine import CPU, INTERPRETED, needs_triton
from test_ops import assert_no_worse, cast, changed, over, over_dtypes, samples
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from detloss_triton import use_backend
from detloss_triton.backend import record_launches
from detloss_triton.coders import DeltaXYWHBBoxCoder
from detloss_triton.engine import REGISTRY, FusedOp, Sample, as_rows, mapped, tensors_of

FUSED_OPS = [op for op in REGISTRY.values() if isinstance(op, FusedOp)]
over_fused = over(*FUSED_OPS, name="tested")


def upstream_for(out: Tensor) -> Tensor:
    return torch.linspace(-0.5, 2, out.numel()).view(out.shape).to(out)


def gradients_of(out: Tensor, leaves: list[Tensor], **how: Any) -> list[Tensor]:
    if not out.requires_grad:  # of nothing that asks for a gradient
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(out, leaves, upstream_for(out), allow_unused=True, **how)
    # What no loss is of, or has no elements, may be no part of the reference.
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def computed(function: Any, tested: FusedOp, sample: Sample) -> list[Tensor]:
    """[losses, *gradients] of the op or of its reference."""
    given, leaves = tested.with_leaves(sample)
    out = function(*given.inputs, **given.params)
    return [out.detach(), *gradients_of(out, leaves)]


def assert_exact(tested: FusedOp, sample: Sample, as_stored: Sample | None = None) -> None:
    ours = computed(tested, tested, as_stored or sample)
    with use_backend("torch"):
        truth = computed(tested.reference, tested, cast(sample, torch.float64))
        peer = computed(tested.reference, tested, cast(sample, torch.float32))
    names = ["out", *(f"gradient {i}" for i in range(len(ours) - 1))]
    assert_no_worse(names, ours, peer, truth)


def channels_first(x: Tensor) -> Tensor:
    """Rows of features as heads give them, (N, features, rows) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x


def cast_next(dtypes: Iterator[torch.dtype], x: Tensor) -> Tensor:
    return x.to(next(dtypes)) if x.is_floating_point() else x


def spread(x: Tensor) -> Tensor:
    """Every other entry of larger memory, in each dimension."""
    wide = x.new_zeros([2 * n for n in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


@over_fused
@over_dtypes
@over(0, 1, 40, 300, name="rows")
def test_parity(
    tested: FusedOp, dtype: torch.dtype, rows: int, backend: str, device: torch.device
) -> None:
    # Other dtypes change how tensors are read, other sizes how sums are cut.
    chosen = samples(tested, rows, device)[: None if rows == 40 else 1]
    for sample in chosen if rows == 40 or dtype == torch.float32 else []:
        assert_exact(tested, cast(sample, dtype))


@over_fused
@over(channels_first, spread, name="layout")
def test_layouts(tested: FusedOp, layout: Any, backend: str, device: torch.device) -> None:
    for sample in samples(tested, 12, device):
        assert_exact(tested, sample, changed(sample, layout))


def as_map(x: Tensor, width: int, layout: str) -> Tensor:
    """(N, n, ...features) rows as a map (N, features..., H, W), their order reversed; as they are
    where there are none, or they make no rectangle."""
    if x.shape[1] == 0 or x.shape[1] % width:
        return x
    features = x if x.dim() > 2 else x.unsqueeze(-1)
    cells = features.permute(0, *range(features.dim() - 1, 0, -1)).unflatten(-1, (-1, width))
    if layout == "channels last" and cells.dim() == 4:
        return cells.contiguous(memory_format=torch.channels_last)
    return spread(cells) if layout == "spread" else cells.contiguous()


@pytest.mark.parametrize(
    ("layout", "width"), [("contiguous", 4), ("contiguous", 1), ("channels last", 4), ("spread", 4)]
)
@pytest.mark.parametrize("name", [op.name for op in FUSED_OPS if any(op.dims)])
def test_maps_are_as_their_rows(
    name: str, layout: str, width: int, backend: str, device: torch.device
) -> None:
    """Losses and gradients, of maps that a kernel walks and of those that are made into rows."""
    tested = REGISTRY[name]
    assert isinstance(tested, FusedOp)
    for sample in samples(tested, 20, device)[:2]:
        inputs: list[Any] = list(sample.inputs)
        for i, dim in enumerate(tested.dims):
            if dim:
                inputs[i] = tuple(as_map(x, width, layout) for x in inputs[i])
        assert any(x.dim() > 3 for x in inputs[0])
        of_maps = computed(tested, tested, Sample(tuple(inputs), sample.params))
        of_rows = computed(tested, tested, Sample(tested.rows(inputs), sample.params))
        for by_map, by_row in zip(of_maps, of_rows, strict=True):
            is_map = by_map.shape != by_row.shape
            assert torch.equal(as_rows(by_map, by_row.dim()) if is_map else by_map, by_row)


@over_fused
def test_losses_one_by_one(tested: FusedOp, backend: str, device: torch.device) -> None:
    """They are the entries of the vector, may be modified in place, and twice differentiated."""
    sample = samples(tested, 6, device)[0]
    given, leaves = tested.with_leaves(sample)
    whole = tested(*given.inputs, **given.params)
    losses = tested.unbound(*given.inputs, n_rows=2, **given.params)
    assert [x.dim() for x in losses] == [int(i < 2) for i in range(len(whole))]
    factors = torch.arange(2, len(whole) + 2, device=device)
    for x, factor in zip(losses, factors, strict=True):
        x.mul_(factor)
    scaled = torch.cat([x.view(1) for x in losses])
    assert torch.equal(scaled, whole * factors)
    for how in ({"retain_graph": True}, {"create_graph": True}):
        found = torch.autograd.grad(scaled, leaves, upstream_for(whole), **how)
        expected = torch.autograd.grad(whole, leaves, upstream_for(whole) * factors, **how)
        assert all(map(torch.equal, found, expected))
    # What a sum hands down is one number to all of them.
    losses, one = tested.unbound(*given.inputs, **given.params), torch.tensor(0.5, device=device)
    expected = torch.autograd.grad(whole, leaves, one.expand_as(whole), retain_graph=True)
    for how in ({"retain_graph": True}, {"create_graph": True}):
        found = torch.autograd.grad(losses, leaves, [one] * len(losses), **how)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


@over_fused
def test_levels_of_several_dtypes(tested: FusedOp, backend: str, device: torch.device) -> None:
    for sample in samples(tested, 12, device):
        dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
        assert_exact(tested, changed(sample, functools.partial(cast_next, dtypes)))


@over_fused
def test_some_gradients_are_wanted(tested: FusedOp, backend: str, device: torch.device) -> None:
    """Of every set of inputs, and of one tensor alone; all are as if all were wanted."""
    for sample in samples(tested, 5, device)[:2]:
        given, leaves = tested.with_leaves(sample)
        expected = gradients_of(tested(*given.inputs, **given.params), leaves)
        inputs = [
            x for x, flag in zip(given.inputs, tested.differentiable, strict=True) if flag and x
        ]
        groups = [list(tensors_of(x)) for x in inputs]
        chosen = [
            [x for group, taken in zip(groups, flags, strict=True) if taken for x in group]
            for flags in itertools.product([False, True], repeat=len(groups))
            if any(flags)
        ]
        for wanted in [*chosen, leaves[:1], leaves[-1:]]:
            for leaf in leaves:
                leaf.requires_grad_(any(leaf is x for x in wanted))
            found = gradients_of(tested(*given.inputs, **given.params), wanted)
            for leaf, gradient in zip(wanted, found, strict=True):
                i = next(i for i, x in enumerate(leaves) if x is leaf)
                assert torch.equal(gradient, expected[i])
        for leaf in leaves:
            leaf.requires_grad_(False)
        assert not tested(*given.inputs, **given.params).requires_grad


@over_fused
def test_backward_runs_twice_the_same(tested: FusedOp, backend: str, device: torch.device) -> None:
    for sample in samples(tested, 12, device)[:1]:
        given, leaves = tested.with_leaves(sample)
        out = tested(*given.inputs, **given.params)
        first = gradients_of(out, leaves, retain_graph=True)
        again = tested(*given.inputs, **given.params)
        assert torch.equal(out, again)
        for gradients in (gradients_of(out, leaves), gradients_of(again, leaves)):
            assert all(map(torch.equal, gradients, first))


@over_fused
def test_a_gradient_can_be_differentiated(
    tested: FusedOp, backend: str, device: torch.device
) -> None:
    for sample in samples(tested, 15, device)[:1]:
        given, leaves = tested.with_leaves(sample)
        found = gradients_of(tested(*given.inputs, **given.params), leaves, create_graph=True)
        expected = gradients_of(
            tested.reference(*given.inputs, **given.params), leaves, create_graph=True
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@over_fused
@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(tested: FusedOp, backend: str, device: torch.device) -> None:
    for rows in (33, 1, 0):
        for sample in samples(tested, rows, device)[:2]:
            assert all(x.isfinite().all() for x in computed(tested, tested, sample))


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, from an address that is no multiple of 16."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@over_fused
def test_what_is_known_of_a_layout_is_of_that_layout(
    tested: FusedOp, backend: str, device: torch.device
) -> None:
    """Of tensors with other values, addresses and layouts, in turns, and another number."""
    sample = samples(tested, 2, device)[0]
    others = [sample.changed(change) for change in (torch.clone, channels_first, spread)]
    others += [sample.changed(lambda x: x * 0.75 if x.is_floating_point() else x)]
    others += [sample.changed(misaligned)]
    if "number" in sample.params:
        number = {"number": 3 * sample.params["number"]}
        others.append(Sample(sample.inputs, {**sample.params, **number}))
    expected = []
    for other in others:
        tested.signatures.clear()
        expected.append(computed(tested, tested, other))
    # The last has left what is known of it, the others add to that.
    for other, before in zip(others, expected, strict=True):
        assert all(map(torch.equal, computed(tested, tested, other), before))
    assert all(map(torch.equal, computed(tested, tested, sample), expected[0]))


@over_fused
def test_saved_tensors_may_be_copied(tested: FusedOp, backend: str, device: torch.device) -> None:
    """As by `torch.autograd.graph.save_on_cpu`: the copies have the numbers, not the strides."""

    def copied(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

    sample = samples(tested, 6, device)[0].changed(
        lambda x: x.mT.contiguous().mT if x.dim() > 1 else x
    )
    given, leaves = tested.with_leaves(sample)
    expected = gradients_of(tested(*given.inputs, **given.params), leaves)
    with torch.autograd.graph.saved_tensors_hooks(copied, lambda x: x):
        out = tested(*given.inputs, **given.params)
    for found, x in zip(gradients_of(out, leaves), expected, strict=True):
        torch.testing.assert_close(found, x)


@over_fused
def test_a_tracer_without_memory_sees_the_reference(tested: FusedOp) -> None:
    if tested.name == "mined":
        pytest.skip("looks at values on a CPU")
    sample = samples(tested, 6, CPU)[0]

    def losses(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return tested(*mapped(lambda x: next(given), sample.inputs), **sample.params)

    with use_backend("torch"):
        graph = make_fx(losses, tracing_mode="fake")(*tensors_of(sample.inputs))
        assert len(graph.graph.nodes) > len(tensors_of(sample.inputs))


def test_one_tensor_may_be_two_inputs_in_one_call_only(backend: str, device: torch.device) -> None:
    tested = REGISTRY["queries"]
    assert isinstance(tested, FusedOp)
    sample = samples(tested, 12, device)[1]
    logits, boxes, (matches,), (union,), *others = sample.inputs
    tested.signatures.clear()
    own = matches[:1]
    for of_boxes in (own, union):
        given = Sample((logits, boxes, (own,), (of_boxes,), *others), sample.params)
        assert_exact(tested, given)


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Those in containers, and in objects of this library, but for ops."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for entry in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(entry)
    elif type(x).__module__.startswith("detloss_triton") and not isinstance(x, FusedOp):
        yield from tensors_in(vars(x))


@needs_triton
def test_signatures_are_few_and_hold_no_tensor() -> None:
    tested = REGISTRY["positives"]
    assert isinstance(tested, FusedOp)
    with record_launches():
        for rows in range(300):
            sample = samples(tested, rows, CPU)[0]
            tested(*sample.inputs, **sample.params)
    assert 0 < len(tested.signatures) <= 256
    known = list(tested.signatures.items())
    assert not list(tensors_in(known))
    known[0][1].kept = sample.inputs
    assert list(tensors_in(known))


@over_fused
def test_inputs_are_left_alone(tested: FusedOp, backend: str, device: torch.device) -> None:
    for sample in samples(tested, 15, device):
        before = mapped(Tensor.clone, sample.inputs)
        computed(tested, tested, sample)
        assert all(map(torch.equal, tensors_of(before), tensors_of(sample.inputs)))


@pytest.mark.skipif(not INTERPRETED, reason="runs kernels on a CPU")
@pytest.mark.usefixtures("interpreter")
@over(*[op for op in FUSED_OPS if op.in_graphs], name="tested")
def test_a_graph_calls_the_same_kernels(tested: FusedOp) -> None:
    for sample in samples(tested, 5, CPU)[:1]:
        torch._dynamo.reset()
        given, leaves = tested.with_leaves(sample)

        def step(inputs: Any, params: Any = sample.params) -> Tensor:
            return tested(*inputs, **params)

        with use_backend("triton"):
            expected = step(given.inputs)
            out = torch.compile(step, fullgraph=True, backend="aot_eager")(given.inputs)
            assert torch.equal(out, expected)
            assert all(map(torch.equal, gradients_of(out, leaves), gradients_of(expected, leaves)))


def as_a_strangers(module: Any) -> None:
    """Have a module, a matcher or a coder compute the same, by methods that are not known."""
    kind, methods = type(module), {"forward", "decode"} & vars(type(module)).keys()
    own = {
        name: lambda self, *a, name=name, **k: getattr(kind, name)(self, *a, **k)
        for name in methods
    }
    module.__class__ = type("Own", (kind,), own)


# What holds others' parts, where that is not all losses; and the op that then is not called.
SLOTS = {"ssd": ("bbox_coder",), "detr": ("matcher",), "dfine": ("matcher",)}
FUSED_BY = {"atss": "dense", "rtmdet": "dense", "yolox": "positives", "yolov9": "aligned"}


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_criterion_equals_its_parts(
    name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that count as a stranger's are called one by one, as OTX calls them."""
    batch = case(name, (3, 0, 4)).on(device)
    if name == "ssd":
        batch.criterion.bbox_coder = DeltaXYWHBBoxCoder()
        batch.criterion.reg_decoded_bbox = True
    losses, gradients = batch.step()
    for slot in SLOTS.get(name, [x for x in batch.criterion._modules if x.startswith("loss_")]):
        as_a_strangers(getattr(batch.criterion, slot))
    if name in FUSED_BY:
        module = f"detloss_triton.criteria.{name}.{FUSED_BY[name]}"
        monkeypatch.setattr(module, None)
    of_parts, their_gradients = batch.step()
    assert_same(losses, of_parts, 1e-6)
    assert_same(gradients, their_gradients, 1e-6)


def test_all_fused_ops_are_walked() -> None:
    assert {"dense", "total"} <= {op.name for op in FUSED_OPS}
