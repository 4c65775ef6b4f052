"""Linear sum assignment against scipy: random, degenerate and ragged problems, both backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import needs_triton
from scipy.optimize import linear_sum_assignment as scipy_solve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detloss_triton import use_backend
from detloss_triton.backend import record_launches
from detloss_triton.ops.assignment import LIMIT, linear_sum_assignment, optimal_assignment

Matrix = npt.NDArray[np.float64]


def finite(cost: Tensor) -> Matrix:
    """What the solver sees: float64, clamped, NaN as the upper limit."""
    cost = cost.detach().cpu().double()
    return torch.where(cost.isnan(), LIMIT, cost).clamp(-LIMIT, LIMIT).numpy()


def solved(
    cost: Tensor, n_rows: list[int] | None, n_cols: list[int] | None, device: torch.device
) -> Matrix:
    counts = [None if n is None else torch.tensor(n, device=device) for n in (n_rows, n_cols)]
    out = linear_sum_assignment(cost.to(device), *counts)
    assert out.dtype == torch.int64
    assert out.shape == cost.shape[:-1]
    return out.cpu().numpy()


def check(
    cost: Tensor,
    device: torch.device,
    n_rows: list[int] | None = None,
    n_cols: list[int] | None = None,
    unique: bool = False,
    relative: float = 1e-6,
) -> None:
    """Every problem is a matching of the size and total cost of scipy's, or, if unique, scipy's."""
    result = solved(cost, n_rows, n_cols, device)
    for p, out in enumerate(result):
        r = cost.shape[1] if n_rows is None else n_rows[p]
        c = cost.shape[2] if n_cols is None else n_cols[p]
        problem = finite(cost[p])[:r, :c]
        rows, columns = scipy_solve(problem)
        expected = np.full(cost.shape[1], -1)
        expected[rows] = columns
        if unique:
            np.testing.assert_array_equal(out, expected)
            continue
        matched = np.flatnonzero(out >= 0)
        assert (out >= -1).all()
        assert len(matched) == len(rows) == len(set(out[matched].tolist()))
        assert (matched < r).all()
        assert (out[matched] < c).all()
        ours, theirs = problem[matched, out[matched]], problem[rows, columns]
        assert abs(ours.sum() - theirs.sum()) <= relative * np.abs(theirs).sum()


def random_counts(rng: np.random.Generator, n: int, size: int) -> list[int]:
    return [int(x) for x in rng.integers(0, size + 1, n)]


def test_random_problems(backend: str, device: torch.device, poisoned_memory: None) -> None:
    # The interpreter takes tens of milliseconds a problem.
    interpreted = backend == "triton" and device.type == "cpu"
    n_batches, n_problems, largest = (15, 10, 9) if interpreted else (80, 25, 40)
    rng = np.random.default_rng(0)
    for _ in range(n_batches):
        n_rows, n_cols = (int(x) for x in rng.integers(1, largest + 1, 2))
        cost = torch.from_numpy(rng.standard_normal((n_problems, n_rows, n_cols))).float()
        ragged = (random_counts(rng, n_problems, n_rows), random_counts(rng, n_problems, n_cols))
        # float32 costs differ by enough that no two matchings tie.
        check(cost, device, *ragged, unique=True)


def test_as_many_rows_as_columns_needs_long_paths(backend: str, device: torch.device) -> None:
    cost = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0))
    check(cost, device, unique=True)
    # Products make every row prefer the same columns: the hard case of Machol and Wien.
    ramp = torch.arange(1.0, 13.0)
    check((ramp[:, None] * ramp)[None], device, relative=0)


DEGENERATE: dict[str, Callable[[torch.Generator], Tensor]] = {
    "zero": lambda g: torch.zeros(2, 5, 7),
    "constant": lambda g: torch.full((2, 7, 7), 3.5),
    "two values": lambda g: torch.randint(0, 2, (6, 6, 8), generator=g).float(),
    "integers": lambda g: torch.randint(-5, 6, (6, 7, 7), generator=g).float(),
    "equal rows": lambda g: torch.randint(0, 9, (4, 1, 8), generator=g).float().repeat(1, 6, 1),
    "equal columns": lambda g: torch.randint(0, 9, (4, 6, 1), generator=g).float().repeat(1, 1, 6),
    "more rows": lambda g: torch.randint(0, 4, (4, 9, 4), generator=g).float(),
    "large integers": lambda g: torch.randint(0, 2**24, (4, 6, 7), generator=g).float(),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_ties(name: str, backend: str, device: torch.device) -> None:
    # Integers, so the total is exact whichever of the optimal matchings it is.
    check(DEGENERATE[name](torch.Generator().manual_seed(0)), device, relative=0)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-6, 1e6, 1e9])
def test_magnitudes(scale: float, backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(3, 5, 8, generator=generator)
    check(cost * scale, device, unique=True)
    # Rows of their own magnitude, as where one image's boxes are in pixels.
    powers = torch.tensor([1e-6, 1.0, 1e3, 1e-3, 1e6])
    check(cost * powers[:, None], device)


def test_nan_and_infinite_costs(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38])
    for kinds, n_rows, n_cols in ((bad[:2], 5, 7), (bad[:2], 7, 5), (bad, 5, 7)):
        cost = torch.rand(6, n_rows, n_cols, generator=generator)
        which = torch.randint(0, len(kinds), cost.shape, generator=generator)
        cost = torch.where(torch.rand(cost.shape, generator=generator) < 0.4, kinds[which], cost)
        cost[0] = float("nan")
        cost[1, 2] = float("inf")
        out = solved(cost, None, None, device)
        for problem, columns in zip(finite(cost), out, strict=True):
            rows = np.flatnonzero(columns >= 0)
            ours, theirs = problem[rows, columns[rows]], problem[scipy_solve(problem)]
            # Beside 1e10 the finite costs would vanish in a relative comparison of the totals.
            for limit in (LIMIT, -LIMIT):
                assert (ours == limit).sum() == (theirs == limit).sum()
            ours, theirs = (x[np.abs(x) < LIMIT].sum() for x in (ours, theirs))
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0), (3, 1, 1)]
)
def test_empty_and_single(
    shape: tuple[int, int, int], backend: str, device: torch.device, poisoned_memory: None
) -> None:
    check(torch.rand(shape), device, unique=True)


def test_padding_is_not_read(backend: str, device: torch.device) -> None:
    cost = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))
    counts = ([2, 5, 0], [6, 3, 4])
    before = solved(cost, *counts, device)
    for p, (r, c) in enumerate(zip(*counts, strict=True)):
        cost[p, r:] = -1e9
        cost[p, :, c:] = float("nan")
    np.testing.assert_array_equal(solved(cost, *counts, device), before)
    assert (before[2] == -1).all()


def test_counts_are_clamped_to_the_cost(backend: str, device: torch.device) -> None:
    cost = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    beyond = solved(cost, [99, -1], [2**30, 4], device)
    np.testing.assert_array_equal(beyond, solved(cost, [3, 0], [4, 4], device))


def test_strides(backend: str, device: torch.device) -> None:
    by_query = torch.rand(3, 9, 4, generator=torch.Generator().manual_seed(0))
    check(by_query.transpose(1, 2), device, [4, 2, 0], unique=True)
    check(by_query.permute(1, 2, 0)[:2, :, ::2], device, unique=True)
    check(by_query[:1].expand(2, 9, 4), device, unique=True)
    one = linear_sum_assignment(by_query[0].to(device), torch.tensor(3, device=device))
    assert one.tolist() == solved(by_query[:1], [3], None, device)[0].tolist()
    counts = torch.tensor([[3, 4], [1, 2], [2, 3]], dtype=torch.int32, device=device).unbind(1)
    out = linear_sum_assignment(by_query.to(device), *counts)
    assert out.tolist() == solved(by_query, [3, 1, 2], [4, 2, 3], device).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    cost = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    cost[0, 1, 2], cost[1, 0, 0] = float("inf"), float("nan")
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            check(cost, device)
    else:
        check(cost, device, relative=1e-12)


def test_most_columns_and_many_boxes(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    check(torch.rand(1, 3, 4096, generator=generator), device, unique=True)
    # 1,000 boxes for 100 queries; the columns of the solver are then the boxes.
    check(torch.rand(1, 1000, 100, generator=generator), device, [950], unique=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    n_rows, n_cols = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    values = st.one_of(st.integers(-3, 3), st.integers(-(2**20), 2**20))
    flat = draw(st.lists(values, min_size=n_rows * n_cols, max_size=n_rows * n_cols))
    cost = torch.tensor(flat, dtype=torch.float32).reshape(1, n_rows, n_cols)
    return cost, draw(st.integers(0, n_rows)), draw(st.integers(0, n_cols))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(problems())
def test_any_integers_torch(problem: tuple[Tensor, int, int]) -> None:
    cost, n_rows, n_cols = problem
    with use_backend("torch"):
        check(cost, torch.device("cpu"), [n_rows], [n_cols], relative=0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(problem=problems())
@pytest.mark.usefixtures("kernels")
def test_any_integers_triton(device: torch.device, problem: tuple[Tensor, int, int]) -> None:
    cost, n_rows, n_cols = problem
    with use_backend("triton"):
        check(cost, device, [n_rows], [n_cols], relative=0)


def test_arguments_are_checked(backend: str, device: torch.device) -> None:
    cost = torch.rand(2, 3, 4, device=device)
    two = torch.tensor([1, 2], device=device)
    for arguments, message in (
        ((cost[0, 0],), r"cost must have shape \(P, R, C\) or \(R, C\), got \(4,\)"),
        ((cost[None],), r"cost must have shape"),
        ((cost.long(),), "cost must be floating point, got torch.int64"),
        ((cost, two[:1]), r"n_rows must have shape \(2,\) .* got \(1,\)"),
        ((cost, None, two[None]), r"n_cols must have shape \(2,\) .* got \(1, 2\)"),
        ((cost[0], two), r"n_rows must have shape \(\) .* got \(2,\)"),
        ((cost, two.float()), "n_rows must hold integers, got torch.float32"),
        ((cost, None, two.bool()), "n_cols must hold integers, got torch.bool"),
        ((cost, two.to("meta")), "n_rows is on meta, cost on"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_sum_assignment(*arguments)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 4097), (1, 4097, 1), (1, 1025, 1025)])
def test_the_kernel_refuses_what_it_cannot_hold(shape: tuple[int, ...]) -> None:
    with record_launches(), pytest.raises(RuntimeError, match=r"4096 by 1024 .* got"):
        linear_sum_assignment(torch.zeros(shape))


def test_the_reference_has_no_limit(device: torch.device) -> None:
    with use_backend("torch"):
        check(torch.rand(1, 2, 5000), device, unique=True)


def test_no_gradient(backend: str, device: torch.device) -> None:
    cost = torch.rand(2, 3, 4, device=device, requires_grad=True)
    assert not linear_sum_assignment(cost).requires_grad


class HostReads(TorchDispatchMode):
    """Fails on what reads a value back or gives a shape by data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


def test_the_reference_reads_no_value_back(device: torch.device) -> None:
    cost = torch.rand(3, 4, 6, device=device)
    with use_backend("torch"), HostReads():
        linear_sum_assignment(cost, torch.tensor([1, 4, 0], device=device))


def test_the_reference_is_one_node_to_the_compiler() -> None:
    cost = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    n_rows, n_cols = torch.tensor([4, 2, 0]), torch.tensor([6, 1, 3])
    names: list[str] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with use_backend("torch"):
        compiled = torch.compile(
            lambda x: linear_sum_assignment(2 * x, n_rows, n_cols) + 1,
            fullgraph=True,
            backend=count,
        )
        torch.testing.assert_close(
            compiled(cost), linear_sum_assignment(2 * cost, n_rows, n_cols) + 1
        )
    assert sum("linear_sum_assignment" in name for name in names) == 1
    torch.library.opcheck(
        torch.ops.detloss_triton.linear_sum_assignment.default,
        (cost, n_rows, n_cols),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def variant(arguments: dict[str, Any]) -> str:
    """What Triton compiles anew for: constants, warps and types, as nothing else is specialised."""
    return json.dumps(
        {
            name: str(value.dtype) if isinstance(value, Tensor)
            else value if name.isupper() or name == "num_warps"
            else abs(value) >= 2**31
            for name, value in arguments.items()
        }
    )  # fmt: skip


@needs_triton
def test_one_compile_per_column_bucket() -> None:
    rng = np.random.default_rng(0)
    for n_queries, block in ((100, 128), (300, 512), (900, 1024)):
        variants = set()
        for n_boxes in rng.integers(1, n_queries + 1, 50).tolist():
            cost = torch.empty(2, n_queries, n_boxes).transpose(1, 2)
            counts = torch.full((2,), n_boxes)
            with record_launches() as launches:
                optimal_assignment(cost, counts, counts)
            (launch,) = launches
            assert launch.arguments["BC"] == block
            variants.add(variant(launch.arguments))
        assert len(variants) == 1
