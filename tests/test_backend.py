"""Which backend runs, and what happens where it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from machine import environment, needs_triton

import detloss_triton
from detloss_triton import backend, use_backend
from detloss_triton.functional import generalized_box_iou_loss, sigmoid_focal_loss


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, with nothing of this process's choice of backend."""
    clean: dict[str, str | None] = {"TRITON_INTERPRET": None, "DETLOSS_BACKEND": None}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**{**clean, **variables}),
        capture_output=True,
        text=True,
        timeout=120,
    )


def kernels_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from here on, as they are."""
    names: list[str] = []
    launch = backend.launch

    def spy(kernel: object, *args: object, **kwargs: object) -> None:
        names.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)  # type: ignore[attr-defined]
        launch(kernel, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "launch", spy)
    return names


@pytest.mark.usefixtures("kernels")
def test_the_kernel_really_runs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    ran = kernels_run(monkeypatch)
    logits = torch.randn(5, 3, device=device, requires_grad=True)
    with use_backend("triton"):
        sigmoid_focal_loss(logits, torch.zeros(5, 3, device=device), reduction="sum").backward()
    assert ran == ["class_kernel", "class_kernel"], "one launch forward, one backward"
    ran.clear()
    with use_backend("torch"):
        sigmoid_focal_loss(logits, torch.zeros(5, 3, device=device), reduction="sum").backward()
    assert ran == []


def test_use_backend_holds_as_function_and_ends_as_context() -> None:
    before = backend._requested
    with use_backend("torch"):
        assert backend._requested == "torch"
        with use_backend("triton"):
            assert backend._requested == "triton"
        assert backend._requested == "torch"
    assert backend._requested == before
    use_backend("torch")
    assert backend._requested == "torch"
    use_backend(before)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        use_backend("cuda")  # type: ignore[arg-type]
    assert backend._requested == before


def test_auto_keeps_cpu_tensors_on_torch() -> None:
    with use_backend("auto"):
        assert backend.choose(torch.device("cpu")) == "torch"


@pytest.mark.usefixtures("kernels")
def test_float64_is_refused_by_name_and_taken_by_auto(device: torch.device) -> None:
    boxes = torch.rand(3, 4, dtype=torch.float64, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"float32.*float64"):
        generalized_box_iou_loss(boxes, boxes)
    with use_backend("auto"):
        assert generalized_box_iou_loss(boxes, boxes).dtype == torch.float64


@needs_triton
def test_triton_on_the_cpu_without_the_interpreter_is_refused() -> None:
    code = (
        "import torch, detloss_triton as d\n"
        "x = torch.rand(3, 4)\n"
        "print(d.functional.generalized_box_iou_loss(x, x).sum().item())"
    )
    run = python(code, DETLOSS_BACKEND="triton")
    assert run.returncode != 0
    assert "backend 'triton' was requested but cannot run" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr
    assert python(code).returncode == 0


def test_a_wrong_environment_variable_is_refused() -> None:
    code = "import torch, detloss_triton as d; x = torch.rand(3, 4); d.GIoULoss()(x, x)"
    run = python(code, DETLOSS_BACKEND="gpu")
    assert run.returncode != 0
    assert "DETLOSS_BACKEND must be one of auto, triton, torch, got 'gpu'" in run.stderr


def test_the_package_works_without_triton() -> None:
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError("no triton here")
sys.meta_path.insert(0, NoTriton())
import torch, detloss_triton as d
x = torch.randn(4, 3, requires_grad=True)
d.CrossSigmoidFocalLoss()(x, torch.tensor([0, 1, 2, 3])).backward()
assert x.grad.abs().sum() > 0
d.use_backend("triton")
try:
    d.CrossSigmoidFocalLoss()(x, torch.tensor([0, 1, 2, 3]))
except RuntimeError as error:
    print(error)
print(dict(d.backend.describe())["triton"])
"""
    # Torch needs Triton to start on a GPU, so there is none here.
    run = python(code, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Triton cannot be imported") == 2


@needs_triton
def test_recording_launches_runs_nothing() -> None:
    boxes = torch.rand(3, 4)
    with backend.record_launches() as launches:
        generalized_box_iou_loss(boxes, boxes, reduction="sum")
    assert [each.grid for each in launches] == [(1,)]
    assert launches[0].arguments["n_segment"] == 3


def test_describe_names_versions_and_the_backend_of_each_device() -> None:
    rows = dict(backend.describe())
    assert rows["detloss_triton"] == detloss_triton.__version__
    assert rows["torch"] == torch.__version__
    assert any(label.startswith("cpu") for label in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_tensors_own_device() -> None:
    boxes = torch.rand(3, 4, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        generalized_box_iou_loss(boxes, boxes.detach().flip(0), reduction="sum").backward()
    assert boxes.grad is not None and boxes.grad.device.index == 1
