"""Which backend runs, and what happens where it cannot."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine import environment, needs_triton

import detloss_triton
from detloss_triton import backend, use_backend, warn
from detloss_triton.functional import (
    cross_entropy,
    generalized_box_iou_loss,
    linear_sum_assignment,
    sigmoid_focal_loss,
)


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What the backend takes for a GPU with a compiler; tensors there hold no data."""
    monkeypatch.setattr(backend, "_GPU_TYPES", (*backend._GPU_TYPES, "meta"))
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(backend, "_no_compiler", "")
    return torch.device("meta")


def warned(run: Callable[[], object]) -> list[warnings.WarningMessage]:
    with use_backend("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [each for each in caught if "Triton" in str(each.message)]


def fall_back(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    boxes = torch.empty(3, 4, dtype=dtype, device=device)
    detloss_triton.GIoULoss()(boxes, boxes)


REASONS: dict[str, tuple[str, str, Callable[[torch.device], object]]] = {
    "no Triton": ("_no_triton", "Triton cannot be imported (gone)", fall_back),
    "no compiler": ("_no_compiler", "Triton needs a C compiler", fall_back),
    "float64": ("", "torch.float64", lambda device: fall_back(device, torch.float64)),
    "too many classes": (
        "",
        "4096 bins, got 5000",
        lambda device: cross_entropy(
            torch.empty(2, 5000, device=device), torch.empty(2, device=device).long()
        ),
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", REASONS)
def test_falling_back_on_a_gpu_is_said_once_for_each_reason(
    name: str, compiled: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, text, run = REASONS[name]
    if variable:
        monkeypatch.setattr(backend, variable, text)
    torch._dynamo.reset()
    step = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
    (first,) = warned(lambda: step(gpu))
    assert text in str(first.message) and 'use_backend("torch")' in str(first.message)
    # The tests turn warnings of our own modules into errors, and a user looks for a line to change.
    assert first.filename == __file__
    assert warned(lambda: step(gpu)) == []

    warn._said.clear()
    torch._dynamo.reset()
    with use_backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        step(gpu)


def test_another_reason_is_said_too(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(warned(lambda: fall_back(gpu, torch.float64))) == 1
    monkeypatch.setattr(backend, "_no_compiler", "no compiler")
    assert len(warned(lambda: fall_back(gpu))) == 1
    assert warned(lambda: (fall_back(gpu), fall_back(gpu, torch.float64))) == []


def test_the_cpu_warns_of_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_no_triton", "gone")
    cpu = torch.device("cpu")
    cost = torch.zeros(2, 5000, 2)

    def run() -> None:
        fall_back(cpu)
        fall_back(cpu, torch.float64)
        linear_sum_assignment(cost, torch.tensor([3, 4]), torch.tensor([1, 2]))

    assert warned(run) == []


def test_what_is_asked_for_by_name_is_told_of_a_missing_compiler(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_no_compiler", "Triton needs a C compiler, says the test")
    with use_backend("triton"), pytest.raises(RuntimeError, match="C compiler, says the test"):
        fall_back(gpu)
    assert backend.why_not_triton(torch.device("xpu")) == "", "Intel's Triton looks for others"


def test_a_missing_compiler_is_found_at_import(tmp_path: Path) -> None:
    code = (
        "import torch; from detloss_triton import backend; "
        "print(backend.why_not_triton(torch.device('cuda')))"
    )
    run = python(code, PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert ("C compiler" in run.stdout) == (sys.platform == "linux")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Triton brings or finds its own")
@pytest.mark.parametrize(
    ("tools", "named", "expected"),
    [
        ((), None, "found neither gcc nor clang"),
        (("gcc",), None, ""),
        (("clang",), None, ""),
        (("cc",), None, "found neither gcc nor clang"),
        (("gcc",), "nowhere/gcc", "CC='nowhere/gcc' is no program"),
        (("gcc",), "gcc -O3", "CC='gcc -O3' is no program"),
        (("cc",), "cc", ""),
    ],
)
def test_compilers_are_looked_for_as_triton_does(
    tools: tuple[str, ...],
    named: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for tool in tools:
        shutil.copy(sys.executable, tmp_path / tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    found = backend._why_no_compiler()
    assert expected in found and bool(found) == bool(expected)

    build = pytest.importorskip("triton.runtime.build")
    ran: list[str] = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **_: ran.append(command[0]))
    n_lists = len(inspect.signature(build._build).parameters) - 3
    try:
        build._build("a", "a.c", str(tmp_path), *([] for _ in range(n_lists)))
    except RuntimeError:
        ran.append("nowhere")
    assert bool(shutil.which(ran[0])) == (not found)


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
