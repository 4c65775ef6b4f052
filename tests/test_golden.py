"""Losses and gradients against what OTX 2.3.0 computed: see golden/README.md."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from trees import Unchanged, leaves, mapped

import detloss_triton

FILES = sorted((Path(__file__).parent / "golden").glob("*.pt"))
VARIANTS = {"atss": 5, "rtmdet": 3, "ssd": 5, "yolox": 4, "yolov9": 4, "detr": 5, "dfine": 5}
# Files whose recorded `mix` is not what was differentiated: the weights were drawn, in the order of
# the names, for the losses that were connected in OTX, and these were not. (Ours are, with a
# gradient of zero.)
DISCONNECTED = {"detr-all_empty": "loss_giou"}
# Largest error, relative to the largest value of the tensor.
TOLERANCE = 1e-4
# Corners whose layer is its own teacher, and those of the layer beside it. The distillation's
# gradient, T w (p - p'), is 0 there if both softmaxes are summed alike. In another order, which
# memory may ask for, each of two sums of 33 bins is off by up to 6 roundings of half an ulp, and
# their quotients by 2 more: 8 ulps of T w p, and T w p is what the largest gradient beside is.
OWN_TEACHER = {
    "dfine-empty_image": ("outputs.dn_outputs.1.pred_corners", "outputs.dn_outputs.0.pred_corners")
}
ULPS = 8 * torch.finfo(torch.float32).eps


def test_no_file_is_missing() -> None:
    found = [path.stem.split("-")[0] for path in FILES]
    assert {name: found.count(name) for name in VARIANTS} == VARIANTS


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_near(path: str, ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.0) -> None:
    """Within TOLERANCE of the tensor's largest value; where that is zero, within `least`."""
    assert ours.shape == theirs.shape, path
    atol = TOLERANCE * largest(theirs) or least
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda m: f"{path}: {m}")


def mix_of(file: Path, golden: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each loss weighed in the sum that was differentiated."""
    mix: dict[str, torch.Tensor] = golden["mix"]
    disconnected = DISCONNECTED.get(file.stem)
    if disconnected is None:
        return mix
    connected = sorted(name for name in mix if not name.startswith(disconnected))
    return dict(zip(connected, (mix[name] for name in sorted(mix)), strict=False))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_golden(file: Path, backend: str, device: torch.device) -> None:
    golden: dict[str, Any] = torch.load(file, weights_only=True)
    on_device = functools.partial(detloss_triton.Vec2Box, device=device)
    namespace = {**vars(detloss_triton), "Vec2Box": on_device, **golden["params"]}
    criterion = eval(golden["criterion"], namespace).to(device)

    def placed(path: str, x: torch.Tensor) -> torch.Tensor:
        return x.to(device, copy=True).requires_grad_(path in golden["requires_grad"])

    inputs = mapped(placed, golden["inputs"])
    with Unchanged(inputs):
        losses = dict(leaves(criterion(**inputs)))
        mix = {path: weights.to(device) for path, weights in mix_of(file, golden).items()}
        torch.stack([(mix[path] * losses[path]).sum() for path in mix]).sum().backward()

    assert losses.keys() == golden["losses"].keys()
    for path, theirs in golden["losses"].items():
        assert_near(path, losses[path].detach().cpu(), theirs)
    by_path = dict(leaves(inputs))
    assert golden["grads"].keys() == set(golden["requires_grad"])
    taught_by_itself, neighbour = OWN_TEACHER.get(file.stem, ("", ""))
    for path, theirs in golden["grads"].items():
        gradient = by_path[path].grad
        assert gradient is not None, f"{path} has no gradient"
        least = ULPS * largest(golden["grads"][neighbour]) if path == taught_by_itself else 0.0
        assert_near(path, gradient.cpu(), theirs, least)
