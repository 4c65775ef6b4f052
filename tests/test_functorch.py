"""Gradients taken by `torch.func`, and of a batch of upstream gradients: as those of `backward`.

At every size: a large input takes other paths on a CPU, so the thresholds are lowered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import NAMES, case
from torch import Tensor
from trees import leaves, mapped

import detloss_triton as dt
from detloss_triton.engine import REGISTRY, RowOp, cpu


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "large":
        monkeypatch.setattr(cpu, "ELEMENTS", 256)
        monkeypatch.setattr(cpu, "MANY", 0)
    yield


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_under_torch_func(name: str) -> None:
    given = case(name)
    wanted = given.leaves()

    def total(*changed: Tensor) -> Tensor:
        by_path = dict(zip(wanted, changed, strict=True))
        inputs = mapped(lambda path, x: by_path.get(path, x), given.inputs)
        return dt.sum_losses(given.criterion(**inputs))

    plain = [x.detach() for x in wanted.values()]
    expected = torch.autograd.grad(total(*wanted.values()), list(wanted.values()))
    close(torch.func.grad(total, argnums=tuple(range(len(plain))))(*plain), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_upstream_gradients(name: str) -> None:
    given = case(name)
    wanted = list(given.leaves().values())
    losses = torch.stack([x.sum() for _, x in leaves(given.criterion(**given.inputs))])
    rows = torch.eye(len(losses))
    at_once = torch.autograd.grad(losses, wanted, rows, retain_graph=True, is_grads_batched=True)
    for i, row in enumerate(rows):
        close([g[i] for g in at_once], torch.autograd.grad(losses, wanted, row, retain_graph=True))


@pytest.mark.parametrize("name", sorted(n for n, op in REGISTRY.items() if isinstance(op, RowOp)))
def test_an_op_under_vmap_of_grad(name: str) -> None:
    """Per-sample gradients, the other use of transforms: each sample's own, not of their sum."""
    op = REGISTRY[name]
    assert isinstance(op, RowOp)
    for sample in op.samples(40, torch.Generator().manual_seed(0)):
        first, *others = sample.inputs
        assert first is not None

        def loss(x: Tensor, *rest: Any, sample: Any = sample) -> Tensor:
            return op(x.unsqueeze(0), *(None if r is None else r.unsqueeze(0) for r in rest),
                      **sample.params).sum()  # fmt: skip

        in_dims = (0, *(None if x is None else 0 for x in others))
        each = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims)(first, *others)
        leaf = first.clone().requires_grad_()
        (expected,) = torch.autograd.grad(op(leaf, *others, **sample.params).sum(), leaf)
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_kernels_are_refused_by_name_where_a_transform_is_active(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    with dt.use_backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: dt.functional.l1_loss(x, boxes))(boxes + 1)
