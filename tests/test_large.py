"""What is large: many classes, offsets beyond 2^31 elements, thousands of boxes in an image."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import NAMES, SET_CRITERIA, Case, case
from machine import CPU, DEVICE, environment, needs_gpu
from test_criteria import assert_same
from test_ops import (
    DIRECT_OPS,
    ROW_OPS,
    changed,
    evaluated,
    layouts,
    new_gradients_by,
    outputs,
    over,
)
from torch import Tensor

import detloss_triton as dt
from detloss_triton import backend as backends
from detloss_triton.engine import Call, DirectOp, RowOp, cpu, gpu

LVIS_CLASSES = 1203
# Python names it since 3.13.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def with_many_classes(name: str) -> Case:
    drawn = case(name, classes=LVIS_CLASSES, device=DEVICE)
    if name in SET_CRITERIA:
        generator = torch.Generator().manual_seed(0)

        def widen(path: str, x: Tensor) -> Tensor:
            if path.endswith("logits"):
                wide = torch.randn(*x.shape[:-1], LVIS_CLASSES, generator=generator) - 1
                return wide.to(DEVICE)
            if path.endswith("labels"):
                return torch.randint(0, LVIS_CLASSES, x.shape, generator=generator).to(DEVICE)
            return x

        drawn = drawn.changed(widen)
        drawn.criterion.num_classes = LVIS_CLASSES
    return drawn


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_criteria_take_1203_classes(name: str) -> None:
    results = []
    for chosen in ("torch", "triton"):
        with dt.use_backend(chosen), dt.validation(True):
            results.append(with_many_classes(name).step())
    (losses, gradients), (expected_losses, expected_gradients) = results
    assert_same(losses, expected_losses, 1e-5)
    assert_same(gradients, expected_gradients, 1e-4)


@pytest.fixture
def sparse(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """Copies whose first and last entries along a dimension lie 2^31 elements apart.

    The memory between is reserved by no one: only the pages that are touched exist.
    """
    if backend == "triton":
        if DEVICE != CPU:
            pytest.skip("needs interpreted kernels")
        from triton.runtime.interpreter import GridExecutor

        # What it would copy back is in place; a copy would touch all that lies between.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)

    def spread(x: Tensor, axis: int) -> Tensor:
        n = x.shape[axis] if x.dim() else 0
        if n < 2:
            return x
        apart = math.ceil(2**31 / (n - 1)) + 1
        strides = list(x.contiguous().stride())
        strides[axis] = apart
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, span * x.itemsize, flags)
        placed = torch.frombuffer(memory, dtype=x.dtype, count=span).as_strided(x.shape, strides)
        assert (n - 1) * apart > 2**31
        return placed.copy_(x.detach())

    yield spread


needs_noreserve = pytest.mark.skipif(
    sys.platform != "linux", reason="needs memory that exists where it is touched"
)
axes = pytest.mark.parametrize("axis", [0, -1], ids=["rows", "features"])


@needs_noreserve
@axes
@over(*ROW_OPS, name="tested")
def test_offsets_beyond_2_31_of_rows(
    tested: RowOp,
    axis: int,
    backend: str,
    sparse: Callable[[Tensor, int], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows or features that far apart, in inputs and gradients, give what compact ones give."""
    module = gpu if backend == "triton" else cpu
    for sample in layouts(tested, 6, CPU):
        results = []
        for layout in (lambda x: sparse(x, axis), torch.clone):
            inputs = changed(sample, layout)
            monkeypatch.setattr(Call, "new_gradients", new_gradients_by(layout))
            call = Call(tested, tuple(sorted(sample.params.items())), 1, torch.Size([6]))
            results.append(evaluated(module, call, inputs))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@needs_noreserve
@pytest.mark.parametrize("axis", [0, 1, -1], ids=["first", "second", "last"])
@over(*DIRECT_OPS, name="tested")
def test_offsets_beyond_2_31_of_matching(
    tested: DirectOp, axis: int, backend: str, sparse: Callable[[Tensor, int], Tensor]
) -> None:
    for sample in layouts(tested, 6, CPU):
        far = changed(sample, lambda x: sparse(x, axis) if -x.dim() <= axis < x.dim() else x)
        ours = outputs(tested(*far.inputs, **sample.params))
        expected = outputs(tested(*sample.inputs, **sample.params))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@needs_gpu
def test_2_31_logits_on_a_gpu() -> None:
    """Loss and gradient of the last rows among more than 2^31 logits."""
    n_classes = 80
    n_rows = 2**31 // n_classes + 1000
    n_bytes = n_rows * n_classes * 2
    if torch.cuda.mem_get_info()[0] < 2.5 * n_bytes:
        pytest.skip(f"needs {2.5 * n_bytes / 2**30:.0f} GiB of GPU memory")
    logits = torch.full((n_rows, n_classes), -20.0, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(1000, n_classes, device="cuda", dtype=torch.bfloat16)
    logits[-1000:] = last
    labels = torch.full((n_rows,), n_classes, device="cuda")
    labels[-1000:] = torch.arange(1000, device="cuda") % n_classes
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(
        dt.CrossSigmoidFocalLoss(reduction="sum")(logits, labels), logits
    )
    alone = last.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        dt.CrossSigmoidFocalLoss(reduction="sum")(alone, labels[-1000:]), alone
    )
    assert torch.equal(gradient[-1000:], expected)


def test_auto_takes_torch_for_what_is_beyond_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where "auto" means Triton; asked for by name, it is refused."""
    cost = torch.rand(1, 5000, 3)
    logits = torch.randn(2, 5000)
    labels = torch.tensor([4999, 7])
    monkeypatch.setattr(backends, "choose", lambda *arguments: "triton")
    with dt.use_backend("auto"):
        rows = dt.functional.linear_sum_assignment(cost)
        loss = dt.functional.cross_entropy(logits, labels)
    assert (rows >= 0).sum() == 3
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    with dt.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"up to 4096 by 1024 .* got 5000 by 3"):
            dt.functional.linear_sum_assignment(cost)
        with pytest.raises(RuntimeError, match="logits may have up to 4096 bins, got 5000"):
            dt.functional.cross_entropy(logits, labels)


def status(field: str) -> float:
    """A memory size of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def crowded(name: str, n_boxes: int) -> Case:
    """A batch at the size a criterion is trained at, with that many boxes in its one image."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels = torch.randint(0, 80, (n_boxes,), generator=generator)
    if name == "yolov9":

        def head() -> Any:
            sides = [640 // stride for stride in (8, 16, 32)]
            return [
                (
                    (uniform(1, 80, side, side) - 4).requires_grad_(),
                    uniform(1, 16, 4, side, side).requires_grad_(),
                    (1 + 3 * uniform(1, 4, side, side)).requires_grad_(),
                )
                for side in sides
            ]

        low = 560 * uniform(n_boxes, 2)
        boxes = torch.cat([low, low + 8 + 70 * uniform(n_boxes, 2)], -1)
        targets = torch.cat([labels[:, None].float(), boxes], -1)[None]
        criterion = dt.YOLOv9Criterion(80, dt.Vec2Box(None, (640, 640), [8, 16, 32]))
        inputs = {"main_preds": head(), "targets": targets, "aux_preds": head()}
        return Case(name, criterion, inputs)

    def cxcywh(*shape: int) -> Tensor:
        return torch.cat([0.1 + 0.8 * uniform(*shape, 2), 0.02 + 0.1 * uniform(*shape, 2)], -1)

    def layer() -> dict[str, Any]:
        return {
            "pred_logits": (uniform(1, 300, 80) - 3).requires_grad_(),
            "pred_boxes": cxcywh(1, 300).requires_grad_(),
            "pred_corners": uniform(1, 300, 4 * 33).requires_grad_(),
            "ref_points": cxcywh(1, 300),
        }

    outputs: dict[str, Any] = {**layer(), "aux_outputs": [layer() for _ in range(5)]}
    outputs |= {"up": torch.tensor([0.5]), "reg_scale": torch.tensor([4.0])}
    weights = {f"loss_{key}": 1.0 for key in ("vfl", "bbox", "giou", "fgl")}
    kind: Any = dt.DetrCriterion if name == "detr" else dt.DFINECriterion
    targets_of_image = {"labels": labels, "boxes": cxcywh(n_boxes)}
    return Case(name, kind(weights), {"outputs": outputs, "targets": [targets_of_image]})


def measure(name: str, n_boxes: int) -> None:
    """Print by how many MiB a step lets this process grow, at its peak."""
    torch.set_num_threads(1)
    batch = crowded(name, n_boxes)
    # Resets the peak to what is used now.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    batch.step()
    print(status("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("name", "limit"), [("yolov9", 130), ("detr", 350), ("dfine", 350)])
def test_5000_boxes_in_an_image(name: str, limit: float) -> None:
    """The memory that README and docstrings state, with a quarter to spare."""
    run = subprocess.run(
        [sys.executable, __file__, name, "5000"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(DETLOSS_BACKEND="torch"),
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < limit


@needs_gpu
@pytest.mark.parametrize("name", ["yolov9", "detr", "dfine"])
def test_5000_boxes_on_a_gpu(name: str) -> None:
    batch = crowded(name, 5000).changed(lambda _, x: x.cuda())
    if name == "yolov9":
        batch.criterion.vec2box.update((640, 640), "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch.step()
    assert torch.cuda.max_memory_allocated() - before < 2**30


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]))
