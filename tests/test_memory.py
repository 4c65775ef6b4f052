"""Memory of large CPU tensors: mapped, in the right layout, used again when nobody holds it."""

from __future__ import annotations

import pytest
import torch

from detloss_triton import memory


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LARGE", 1)
    monkeypatch.setattr(memory, "_free", [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layout_and_dtype_are_kept(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 5, 3, dtype=dtype).transpose(1, 2)
    for new in (memory.empty_like(x), memory.zeros_like(x)):
        assert (new.dtype, new.shape, new.stride()) == (x.dtype, x.shape, x.stride())
    assert not memory.zeros_like(x).any()


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    x = torch.empty(1000)
    new = memory.empty_like(x).fill_(1)
    address, view = new.data_ptr(), new[:1]
    del new
    other = memory.empty_like(x)
    assert other.data_ptr() != address
    assert view.item() == 1
    del view
    again = memory.zeros_like(x[:700])
    assert again.data_ptr() == address and not again.any()


def test_other_sizes_are_given_back() -> None:
    """What is kept is what the last steps used: at most twice as much as one of them."""
    gone = memory.empty_like(torch.empty(1000))
    del gone
    assert len(memory._free) == 1
    large = memory.empty_like(torch.empty(3000))
    assert not memory._free
    assert large.numel() == 3000


def test_stack_and_take_differentiate_as_torchs_own() -> None:
    x, y = (torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *leaves: memory.stack(leaves), (x, y))
    index = torch.tensor([[2, 0], [1, 1], [0, 2], [2, 2]])
    assert torch.autograd.gradcheck(lambda leaf: memory.take(leaf, 1, index), (x,))
    mixed = memory.stack([x.detach(), y.detach().float()])
    assert mixed.dtype == torch.float64


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", -1)
    assert memory.zeros_like(torch.empty(1000)).eq(0).all()
