"""Row ops inside a compiled graph on a CPU, against the same ops evaluated eagerly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from detloss_triton import use_backend
from detloss_triton.engine import REGISTRY, RowOp, Sample
from detloss_triton.engine.traced import _order, computed_once
from detloss_triton.ops.selection import hardest

ROW_OPS = [each for each in REGISTRY.values() if isinstance(each, RowOp)]
IMAGES, ANCHORS = 3, 20


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch._dynamo.reset()
    with use_backend("torch"):
        yield
    torch._dynamo.reset()


def by_image(x: Tensor | None, features: int) -> Tensor | None:
    """Rows as (images, anchors), features before anchors in memory as in (N, C, H, W) levels."""
    if x is None:
        return None
    x = x.unflatten(0, (IMAGES, ANCHORS))
    return x.transpose(1, 2).contiguous().transpose(1, 2) if features else x


def batch_of(tested: RowOp) -> Sample:
    sample = next(iter(tested.samples(IMAGES * ANCHORS, torch.Generator().manual_seed(0))))
    features = [spec.features for spec in tested.inputs]
    inputs = tuple(by_image(x, n) for x, n in zip(sample.inputs, features, strict=True))
    weight = torch.rand(IMAGES, ANCHORS, generator=torch.Generator().manual_seed(1)).round()
    return Sample(inputs, sample.params, None if tested.values else weight * 1.5)


@pytest.mark.parametrize("tested", ROW_OPS, ids=lambda each: each.name)
def test_the_same_losses_and_gradients(tested: RowOp) -> None:
    """Summed, by image and row by row; a row that is skipped holds NaN."""
    sample = batch_of(tested)

    def step(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        rest = {"weight": sample.weight, **sample.params}
        return tuple(tested(*inputs, keep=keep, **rest) for keep in (0, 1, 2))

    found = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        inputs = [
            x.detach().clone().requires_grad_() if spec.grad and x is not None else x
            for x, spec in zip(sample.inputs, tested.inputs, strict=True)
        ]
        if tested.skip:
            with torch.no_grad():
                inputs[0][sample.weight == 0] = torch.nan  # type: ignore[index]
        outs = run(*inputs)
        total = sum((i + 1) * out.square().sum() for i, out in enumerate(outs))
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found.append([*outs, *torch.autograd.grad(total, wanted)])
    for ours, truth in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


def test_one_row() -> None:
    """Without row dimensions the entries of the one row are still summed."""
    focal = REGISTRY["sigmoid_focal"]
    assert isinstance(focal, RowOp)
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return focal(x, torch.tensor(2), None, None, alpha=0.25, gamma=2.0)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert compiled(x).shape == step(x).shape == ()
    torch.testing.assert_close(compiled(x), step(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_hardest(compiled: bool) -> None:
    run = torch.compile(hardest, backend="aot_eager") if compiled else hardest
    x = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 5.0], [1.0, torch.nan, 0.0], [7.0, 8.0, 9.0]])
    k = torch.tensor([[2], [1], [2], [9]])
    expected = [[1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert run(x, k).tolist() == [[bool(taken) for taken in row] for row in expected]
    assert run(x[:1], k[:1]).tolist() == [[True, False, True]]
    assert run(x[3:], k[3:]).all() and not run(x, k - k).any()
    assert run(x[2:3], k[1:2]).tolist() == [[False, True, False]]
    assert run(torch.ones(0, 3), k[:0]).shape == (0, 3)
    assert run(torch.ones(4, 0), k).shape == (4, 0)


def test_memory_order() -> None:
    assert _order(torch.ones(2, 5, 3)) == [0, 1, 2]
    assert _order(torch.ones(2, 3, 5).transpose(1, 2)) == [0, 2, 1]
    assert _order(torch.ones(4, 3, 2).permute(2, 0, 1)) == [1, 2, 0]
    assert computed_once(torch.ones(2)).shape == (2,)
