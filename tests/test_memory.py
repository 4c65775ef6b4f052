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
@pytest.mark.parametrize("threads", [1, 8])
def test_layout_and_dtype_are_kept(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.zeros(2, 5, 3, dtype=dtype).transpose(1, 2)
    for new in (memory.empty_like(x), memory.zeros_like(x)):
        assert (new.dtype, new.shape, new.stride()) == (x.dtype, x.shape, x.stride())
    used = memory.empty_like(x).fill_(1)
    address = used.data_ptr()
    del used
    zeros = memory.zeros_like(x)
    assert zeros.data_ptr() == address and not zeros.any()


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


def test_the_smallest_that_fits_is_used() -> None:
    several = [memory.empty_like(torch.empty(n)) for n in (1900, 1100, 900, 2100)]
    fitting = several[1].data_ptr()
    del several
    assert memory.empty_like(torch.empty(1000)).data_ptr() == fitting


def test_sizes_no_longer_used_are_given_back() -> None:
    gone = memory.empty_like(torch.empty(1000))
    del gone
    assert len(memory._free) == 1
    for _ in range(memory._KEPT):
        large = memory.empty_like(torch.empty(3000))
        del large
    assert len(memory._free) == 2
    larger = memory.empty_like(torch.empty(9000))
    assert [len(mapping) for _, mapping in memory._free] == [4 * 3000]
    assert larger.numel() == 9000


def test_stack_take_and_forked_differentiate_as_torchs_own() -> None:
    x, y = (torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *leaves: memory.stack(leaves), (x, y))
    index = torch.tensor([[2, 0], [1, 1], [0, 2], [2, 2]])
    assert torch.autograd.gradcheck(lambda leaf: memory.take(leaf, 1, index), (x,))
    assert torch.autograd.gradcheck(lambda leaf: memory.take(leaf, 0, index[:, 0]), (x,))
    assert torch.autograd.gradcheck(lambda leaf: memory.forked(leaf, 1, 3), (x,))
    mixed = memory.stack([x.detach(), y.detach().float()])
    assert mixed.dtype == torch.float64


def test_cat_joins_rows_of_pieces() -> None:
    x, y = torch.rand(4, 3, 5).transpose(0, 1), torch.rand(3, 4, 2)
    rows = [[x, y], [x[:1], y[:1]]]
    assert torch.equal(memory.cat(rows), torch.cat([torch.cat(row, -1) for row in rows]))
    mixed = memory.cat([[x, y.double()]])
    assert mixed.dtype == torch.float64 and mixed.shape == (3, 4, 7)


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", -1)
    assert memory.zeros_like(torch.empty(1000)).eq(0).all()
