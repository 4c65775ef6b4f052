"""float64 in, float64 throughout: whole criteria beside their plain formulas, to 1e-12."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import PLAIN, in_double
from torch import Tensor
from trees import leaves

import detloss_triton as dt
from detloss_triton.bench.batches import BUILDERS

NAMES = sorted(BUILDERS)


def step(inputs: dict[str, Any], losses: Any) -> dict[str, Tensor]:
    """Losses, and gradients of their sum with weights that differ."""
    flat = dict(leaves(losses))
    weighted = sum((1 + 0.1 * i) * flat[key].sum() for i, key in enumerate(sorted(flat)))
    wanted = {path: x for path, x in leaves(inputs) if x.requires_grad}
    assert isinstance(weighted, Tensor)
    gradients = torch.autograd.grad(weighted, list(wanted.values()), materialize_grads=True)
    return {**flat, **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("mixed", [False, True], ids=["all in float64", "targets in float32"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_criteria_in_float64(name: str, mixed: bool, seed: int) -> None:
    """Targets of float32 are exact, and what is made of them is computed as predictions are."""
    batch = BUILDERS[name](seed)
    double = batch.on(torch.device("cpu"), torch.float64)
    ours = double.inputs if mixed else in_double(double.inputs)
    theirs = in_double(double.inputs)
    found = step(ours, double.make()(**ours))
    expected = step(theirs, PLAIN[name](theirs))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == torch.float64, path
        largest = value.abs().max().clamp(1e-3).item() if value.numel() else 1.0
        assert (found[path] - value).abs().max().item() <= 1e-12 * largest, path


@pytest.mark.parametrize("name", NAMES)
def test_numbers_given_as_tensors_are_as_exact(name: str) -> None:
    """`avg_factor` and the like as float32 or integer tensors."""
    batch = BUILDERS[name]()
    inputs = in_double(batch.on(torch.device("cpu"), torch.float64).inputs)
    number = {"atss": "avg_factor", "ssd": "avg_factor", "yolox": "num_total_samples"}.get(name)
    expected = PLAIN[name](inputs)
    if number is None and name not in ("detr", "dfine"):
        pytest.skip("takes no number")
    given: dict[str, Any] = {number: torch.tensor(int(inputs[number]))} if number else {}
    if number is None:
        n_boxes = sum(len(t["labels"]) for t in inputs["targets"])
        given = {"num_boxes": torch.tensor(float(n_boxes))}
    found = dict(leaves(batch.make()(**{**inputs, **given})))
    for path, value in leaves(expected):
        torch.testing.assert_close(found[path], value, rtol=1e-12, atol=1e-12)


def test_float64_is_refused_by_name_where_kernels_are_asked_for(device: torch.device) -> None:
    for name in NAMES:
        batch = BUILDERS[name]().on(device, torch.float64)
        kind = type(batch.criterion(device)).__name__
        with (
            dt.use_backend("triton"),
            pytest.raises(RuntimeError, match=f"{kind}.* is torch.float64"),
        ):
            batch.criterion(device)(**batch.inputs)
