"""Mixed precision: half inputs, autocast, and a GradScaler that meets NaN predictions."""

from __future__ import annotations

import pytest
import torch
from cases import NAMES, Case, assert_same, case
from trees import mapped, mixed

from detloss_triton import use_backend

over_criteria = pytest.mark.parametrize("name", NAMES)
over_halves = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
# Losses against float32 on the same rounded inputs, relative to the largest value: all arithmetic
# is float32. Gradients are rounded once more, to the inputs' dtype.
LOSS_TOLERANCE = 1e-5


def assert_as_in_float32(half: Case, device: torch.device, dtype: torch.dtype) -> None:
    losses, gradients = half.step()
    with torch.autocast(device.type, enabled=False):
        expected, expected_gradients = half.on(device, torch.float32).step()
    for path, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite().all(), path
    for path, gradient in gradients.items():
        assert gradient.dtype == dtype and gradient.isfinite().all(), path
    assert_same(losses, expected, LOSS_TOLERANCE)
    # What a half cannot hold is 0 in both.
    rounded = {path: gradient.to(dtype) for path, gradient in expected_gradients.items()}
    assert_same(gradients, rounded, torch.finfo(dtype).eps)


@over_criteria
@over_halves
def test_half_inputs_under_autocast(
    name: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    with torch.autocast(device.type, dtype):
        assert_as_in_float32(case(name).on(device, dtype), device, dtype)


@over_criteria
@over_halves
def test_half_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_as_in_float32(case(name).on(device, dtype), device, dtype)


@over_criteria
@over_halves
def test_autocast_changes_nothing_in_float32(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = case(name).on(device)
    expected, expected_gradients = batch.step()
    with torch.autocast(device.type, dtype):
        losses, gradients = batch.step()
    assert_same(losses, expected, 0)
    assert_same(gradients, expected_gradients, 0)


@over_criteria
def test_training_goes_on_after_a_step_of_nan(name: str, device: torch.device) -> None:
    """The scaler skips the step and halves its scale; the next one is taken."""
    batch = case(name).on(device)
    parameters = [x.detach().clone().requires_grad_() for x in batch.leaves().values()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        before = [p.detach().clone() for p in parameters]
        scale = scaler.get_scale()
        predictions = iter([p * factor for p in parameters])
        inputs = mapped(
            lambda _, x, rest=predictions: next(rest) if x.requires_grad else x, batch.inputs
        )
        with torch.autocast(device.type, torch.bfloat16):
            losses = batch.criterion(**inputs)
        optimizer.zero_grad()
        scaler.scale(mixed(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        assert moved == (step != 1)
        assert scaler.get_scale() == (scale / 2 if step == 1 else scale)
        assert all(p.isfinite().all() for p in parameters)


def test_half_boxes_are_turned_to_corners_in_float32(device: torch.device) -> None:
    """A box of 4 pixels in 640 has corners that bfloat16 cannot tell apart."""
    batch = case("detr")
    batch.inputs["targets"].boxes[..., 2:] = 4 / 640
    with torch.no_grad():
        batch.inputs["outputs"]["pred_boxes"][..., 2:] = 4 / 640
    with use_backend("torch"):
        assert_as_in_float32(batch.on(device, torch.bfloat16), device, torch.bfloat16)
