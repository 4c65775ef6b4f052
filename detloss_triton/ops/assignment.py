"""Which box each query gets: exact linear sum assignment of many problems at once. No gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment as solve
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.engine import Sample, direct, power_of_2

# What a NaN or infinite cost counts as; large beside any cost of matching, exact in float32.
LIMIT = 1e10
# The largest problem of the kernel, which keeps all of one problem in a program's registers.
_MAX_LONG, _MAX_SHORT = 4096, 1024
# Columns per warp, four to a lane: the reductions between warps cost more than those within one.
_COLUMNS_PER_WARP = 128


def _samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Small whatever `rows` is, for the interpreter is slow.
    few = min(rows, 6)
    for n_rows, n_cols in ((few, 9), (few, few), (9, few)):
        # A planted assignment is the only optimum: any other pair costs 1 or more above the duals.
        # Integers below 256 are exact in every dtype, so rounding makes no ties.
        short, long = min(n_rows, n_cols), max(n_rows, n_cols)
        planted = torch.stack([torch.randperm(long, generator=generator)[:short] for _ in range(2)])
        matched = torch.zeros(2, long, dtype=torch.long).scatter_(1, planted, 1)
        slack = integers(1, 60, 2, short, long).scatter_(2, planted.unsqueeze(2), 0)
        v = integers(-40, 0, 2, 1, long) * matched.unsqueeze(1)
        cost = (slack + integers(40, 100, 2, short, 1) + v).float()
        whole = torch.tensor([[short] * 2, [long] * 2])
        if n_rows > n_cols:
            # Strided, as where a cost is computed query by query and solved box by box.
            cost, whole = cost.transpose(1, 2), whole.flip(0)
        yield Sample((cost, whole[0], whole[1]))
    # Of every second problem no column.
    yield Sample((torch.cat([cost, cost]), None, whole[1] * torch.tensor([1, 0])))


@direct(samples=_samples)
def optimal_assignment(cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None) -> Tensor:
    """`linear_sum_assignment` of a cost (P, R, C) and counts, which are not checked.

    Counts (G,) are of every G problems in turn; without them, a problem is all of its cost.
    """
    return _solve_on_host(cost, n_rows, n_cols)


@torch.library.custom_op(
    "detloss_triton::linear_sum_assignment",
    mutates_args=(),
    schema="(Tensor cost, Tensor? n_rows, Tensor? n_cols) -> Tensor",
)
def _solve_on_host(cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None) -> Tensor:
    column_of_row = np.full(cost.shape[:2], -1, dtype=np.int64)
    # Solved as it lies in memory: the transpose of a problem has the same solution.
    turned = cost.stride(1) < cost.stride(2)
    if turned:
        cost, n_rows, n_cols = cost.transpose(1, 2), n_cols, n_rows
    # One copy to the host and one back: the counts travel with the costs.
    dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
    finite = cost.to(dtype).nan_to_num(nan=LIMIT).clamp_(-LIMIT, LIMIT)
    shape = cost.shape[1:]
    counts = [
        cost.new_full((len(cost),), size, dtype=dtype)
        if n is None
        else n.to(dtype).expand(len(cost) // max(len(n), 1), len(n)).flatten()
        for n, size in zip((n_rows, n_cols), shape, strict=True)
    ]
    packed = torch.cat([finite.flatten(1), torch.stack(counts, 1)], 1).cpu().numpy()
    n_used = packed[:, -2:].clip(0, shape).astype(np.int64).tolist()
    for problem, out, (r, c) in zip(packed, column_of_row, n_used, strict=True):
        rows, columns = solve(problem[:-2].reshape(shape)[:r, :c])
        if turned:
            rows, columns = columns, rows
        out[rows] = columns
    return torch.from_numpy(column_of_row).to(cost.device)


@_solve_on_host.register_fake
def _(cost: Tensor, n_rows: Tensor | None, n_cols: Tensor | None) -> Tensor:
    return cost.new_empty(cost.shape[:2], dtype=torch.int64)


@optimal_assignment.limited
def _(cost: Tensor, *counts: Tensor) -> str:
    n_rows_max, n_cols_max = cost.shape[1:]
    if max(n_rows_max, n_cols_max) <= _MAX_LONG and min(n_rows_max, n_cols_max) <= _MAX_SHORT:
        return ""
    return (
        f"cost may have up to {_MAX_LONG} by {_MAX_SHORT} rows and columns (either way round), "
        f"got {n_rows_max} by {n_cols_max}"
    )


@optimal_assignment.triton
def _(given: Any) -> Tensor:
    n_problems, n_rows_max, n_cols_max = given.cost.shape
    if given.cost.numel() == 0:
        return given.cost.new_full((n_problems, n_rows_max), -1, dtype=torch.int64)
    column_of_row = given.cost.new_empty((n_problems, n_rows_max), dtype=torch.int64)
    block = max(power_of_2(max(n_rows_max, n_cols_max)), _COLUMNS_PER_WARP)
    s_problem, s_row, s_column = given.cost.stride()
    counts = [n for n in (given.n_rows, given.n_cols) if n is not None]
    backend.launch(
        kernels.assignment.assignment_kernel,
        (n_problems,),
        given.cost.device,
        p_cost=given.cost,
        p_n_rows=None if given.n_rows is None else given.n_rows.contiguous(),
        p_n_cols=None if given.n_cols is None else given.n_cols.contiguous(),
        p_column_of_row=column_of_row,
        s_problem=s_problem,
        s_row=s_row,
        s_column=s_column,
        n_counts=len(counts[0]) if counts else n_problems,
        n_rows_max=n_rows_max,
        n_cols_max=n_cols_max,
        LIMIT=LIMIT,
        COLUMN_BITS=_MAX_LONG.bit_length() - 1,
        BC=block,
        num_warps=min(block // _COLUMNS_PER_WARP, 16),
    )
    return column_of_row


def linear_sum_assignment(
    cost: Tensor, n_rows: Tensor | None = None, n_cols: Tensor | None = None
) -> Tensor:
    """The matching of rows to columns of least total cost, exactly, for many problems at once.

    Shortest augmenting paths with float64 duals (Crouse, 2016, doi:10.1109/TAES.2016.140952), the
    method of `scipy.optimize.linear_sum_assignment`, which solves on the torch backend, after one
    copy to the host. On the Triton backend nothing leaves the device, and the number of rows and
    columns does not recompile the kernel. No gradient is defined; the cost is detached.

    Shapes:
        cost: (P, R, C) or (R, C), any float dtype and any strides. The kernel takes at most
            4,096 by 1,024, either way round, and no float64: with the backend on "auto", other
            problems take the torch backend. Reading is fastest where neighbours along the longer
            side are neighbours in memory.
        n_rows, n_cols: (P,), or () for one problem, integers on the device of the cost: problem p
            is `cost[p, :n_rows[p], :n_cols[p]]`. By default all of it. Counts are clamped to the
            shape of the cost; they are not read back, so nothing can be raised for them.
        returns: (P, R) or (R,), int64, the column of each row; -1 for rows beyond n_rows, and
            where a problem has more rows than columns for the rows left over.

    Of several optimal matchings any may be returned. NaN and infinite costs count as 1e10, finite
    ones are clamped to ±1e10: such a pair is matched only if nothing else is left.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for other shapes, dtypes or devices, or too large a problem for the kernel.
    """
    place = "linear_sum_assignment"
    for name, x in (("cost", cost), ("n_rows", n_rows), ("n_cols", n_cols)):
        if not isinstance(x, Tensor) and (x is not None or name == "cost"):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(x).__name__}")
    shape, problems = tuple(cost.shape), cost.shape[:-2]
    if cost.dim() not in (2, 3):
        raise ValueError(f"{place}: cost must have shape (P, R, C) or (R, C), got {shape}")
    if not cost.is_floating_point():
        raise ValueError(f"{place}: cost must be floating point, got {cost.dtype}")
    if cost.dtype == torch.float64:
        backend.refuse_double(f"{place}: cost", cost.device)
    counts: list[Tensor | None] = []
    for name, count in (("n_rows", n_rows), ("n_cols", n_cols)):
        if count is None:
            counts.append(None)
            continue
        if count.shape != problems:
            raise ValueError(
                f"{place}: {name} must have shape {tuple(problems)} for a cost of shape {shape}, "
                f"got {tuple(count.shape)}"
            )
        if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
            raise ValueError(f"{place}: {name} must hold integers, got {count.dtype}")
        if count.device != cost.device:
            raise ValueError(f"{place}: {name} is on {count.device}, cost on {cost.device}")
        counts.append(count.reshape(-1))
    out: Tensor = optimal_assignment(cost if problems else cost.unsqueeze(0), *counts)
    return out.reshape(cost.shape[:-1])
