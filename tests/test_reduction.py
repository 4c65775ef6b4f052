"""Losses handed out of a vector, as users modify them. Sums and means: test_losses.py."""

from __future__ import annotations

import pytest
import torch

from detloss_triton.engine import unbound


def test_unbound_entries_are_modified_in_place_and_by_themselves() -> None:
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    first, second, third, unused = unbound(x * 2)
    first *= 3
    second += first
    third.mul_(0.5).neg_()
    expected = x.detach() * 2
    assert torch.equal(first, expected[0] * 3)
    assert torch.equal(second, expected[1] + expected[0] * 3)
    assert torch.equal(third, expected[2] * -0.5)
    assert torch.equal(unused, expected[3])
    (second + third).backward()
    assert x.grad is not None and x.grad.tolist() == [6, 2, -1, 0]


def test_unbound_is_differentiable_twice_and_one_node() -> None:
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: tuple(unbound(leaf * 2)), (x,))
    assert torch.autograd.gradgradcheck(lambda leaf: tuple(unbound(leaf * leaf)), (x,))
    entries = unbound(x * 2)
    assert len({entry.grad_fn.next_functions[0][0] for entry in entries}) == 1
    (gradient,) = torch.autograd.grad(entries[1].sum(), x)
    assert gradient.tolist() == [[0, 0], [2, 2], [0, 0]]


def test_unbound_without_values_or_gradient() -> None:
    on_meta = unbound(torch.zeros(3, 2, device="meta", requires_grad=True) * 2)
    assert [entry.shape for entry in on_meta] == [(2,)] * 3 and on_meta[0].requires_grad
    assert unbound(torch.zeros(0, requires_grad=True) * 2) == []
    for no_gradient in (torch.no_grad(), torch.inference_mode()):
        with no_gradient:
            first, second = unbound(torch.ones(2) * 2)
            first += second
            assert (first, second) == (4, 2)


@pytest.mark.parametrize("how", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_unbound_of_a_compiled_graph_is_modified_in_place(how: str) -> None:
    x = torch.rand(3, requires_grad=True)
    compiled = torch.compile(lambda leaf: unbound(leaf * 2), fullgraph=True, backend=how)
    first, second, _ = compiled(x)
    first *= 3
    second += first
    second.backward()
    assert x.grad is not None and x.grad.tolist() == [6, 2, 0]
