"""Gradients of few rows in memory that nobody writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detloss_triton.engine import rows_at, zeros


@pytest.fixture(params=[0, 2**40], ids=["mapped", "torch"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeros, "_LARGE", request.param)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_laid_out_as_what_they_are_like(dtype: torch.dtype) -> None:
    x = torch.rand(4, 6, 5).to(dtype)
    for like in (x, x.mT, x[:, ::2], x[..., :1].expand(4, 6, 5), x.permute(2, 0, 1)):
        found, expected = zeros.zeros_like(like), torch.zeros_like(like)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride() and found.dtype == dtype
        found += 1  # is memory of its own
        assert (zeros.zeros_like(like) == 0).all()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("is_map", [False, True])
def test_rows_at_an_index(is_map: bool) -> None:
    """As by an index; a row that does not exist is zeros, and nothing is asked of it."""

    def laid_out(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if is_map else x

    index = torch.tensor([3, 10, 6, 10])
    image, anchor = torch.tensor([0, 1]), torch.tensor([3, 1])
    x = torch.rand(2, 5, 3, dtype=torch.float64)
    x[0, 0] = torch.nan
    x = laid_out(x).requires_grad_()
    out = rows_at(x, index)
    assert torch.equal(out[::2], x[image, anchor]) and (out[1::2] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    expected = torch.zeros(2, 5, 3, dtype=torch.float64)
    expected[image, anchor] = 1
    assert torch.equal(gradient, expected)
    assert gradient.stride() == x.stride() or zeros._LARGE  # as autograd lays it out

    def chosen(x: Tensor) -> Tensor:
        return rows_at(x, index)

    leaf = laid_out(torch.rand(2, 5, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(chosen, leaf)
    assert torch.autograd.gradgradcheck(chosen, leaf)
    jacobian = torch.autograd.functional.jacobian(chosen, leaf)
    assert torch.equal(torch.func.jacrev(chosen)(leaf), jacobian)
    batched = torch.autograd.functional.jacobian(chosen, leaf, vectorize=True)
    assert torch.equal(batched, jacobian)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)])
def test_rows_at_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.rand(*shape, requires_grad=True)
    for index in (torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64)):
        out = rows_at(x, index)
        assert torch.equal(out, torch.zeros(len(index), 3))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.shape == shape
