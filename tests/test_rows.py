"""How kernels find their rows: in two dimensions, and beyond 2^31 of them."""

from __future__ import annotations

import pytest
import torch

from detloss_triton import backend
from detloss_triton.ops.regression import smooth_l1

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from detloss_triton.kernels.rows import rows_of_program  # noqa: E402

BLOCK = 8


@triton.jit
def rows_kernel(
    p_outer, p_inner, p_row, n_segment, n_blocks, n_inner, WIDE: tl.constexpr, BR: tl.constexpr
):
    _, row, at, _ = rows_of_program(n_segment, n_blocks, n_inner, 1, WIDE, BR)
    lane = tl.program_id(0) * BR + tl.arange(0, BR)
    tl.store(p_outer + lane, at[0])
    tl.store(p_inner + lane, at[1])
    tl.store(p_row + lane, row)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("n_segment", [3 * 2**20, 3 * 2**30], ids=["int32", "beyond"])
def test_rows_are_found_in_two_dimensions(n_segment: int, device: torch.device) -> None:
    """The first block of each of four segments."""
    n_inner = 3 * 2**10 + 5
    outer, inner, row = torch.zeros(3, 4, BLOCK, dtype=torch.int64, device=device)
    backend.launch(
        rows_kernel,
        (4,),
        device,
        p_outer=outer,
        p_inner=inner,
        p_row=row,
        n_inner=n_inner,
        n_segment=n_segment,
        n_blocks=1,
        WIDE=n_segment > 2**29,
        BR=BLOCK,
    )
    expected = (torch.arange(4) * n_segment)[:, None] + torch.arange(BLOCK)
    assert torch.equal(row.cpu(), expected)
    assert torch.equal(outer.cpu(), expected // n_inner)
    assert torch.equal(inner.cpu(), expected % n_inner)


@pytest.mark.parametrize("n_rows", [2**31 - 2, 2**31], ids=["int32", "beyond"])
def test_the_launch_says_whether_rows_fit_an_int32(n_rows: int) -> None:
    by_column = torch.empty(2, n_rows // 2, 1, device="meta").transpose(0, 1)
    with backend.record_launches() as launches:
        smooth_l1(by_column, by_column, beta=1.0)
    assert [launch.arguments["WIDE"] for launch in launches] == [n_rows >= 2**31]
