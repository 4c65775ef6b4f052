"""No op and no criterion touches memory that is not its own, whatever labels and counts hold."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from machine import CPU, TESTS, environment, needs_gpu
from test_criteria import made, mixed
from test_detr import EXTRAS, Inputs, criterion_of
from test_ops import REGISTRY, ROW_OPS, changed, evaluated, new_gradients_by, over, samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import mapped

from detloss_triton import Targets, sum_losses
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.engine import Call, Formula, RowOp, cpu, gpu, zeros

WORKER = str(TESTS / "bounds_worker.py")
NAMES = (*REGISTRY, *BUILDERS, "detr", "dfine")


def runs(*names: str) -> set[str]:
    """What the worker says when it has run them."""
    return {f"{chosen} {name}" for chosen in ("torch", "triton") for name in names}


def worker(*arguments: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, sys.executable, WORKER, *arguments],
        # Every allocation is one of the device's, so that what lies beside it is not ours.
        env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        capture_output=True,
        text=True,
        timeout=500,
    )


needs_mprotect = pytest.mark.skipif(os.name != "posix", reason="needs mprotect")


@needs_mprotect
@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("side", ["before", "behind"])
def test_nothing_beyond_a_tensor_is_touched(side: str) -> None:
    """Every tensor, temporaries included, lies at a page that may be neither read nor written."""
    run = worker(side)
    assert run.returncode == 0, f"{run.returncode}: {run.stdout[-200:]} {run.stderr[-2000:]}"
    assert set(run.stdout.splitlines()) == runs(*NAMES)


@needs_mprotect
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_missing_mask_is_caught(side: str) -> None:
    """The interpreter loads by real pointers: a kernel without its mask does not survive."""
    assert worker(side, "planted").returncode == -signal.SIGSEGV


@needs_gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("name", NAMES)
def test_compute_sanitizer_finds_nothing(name: str) -> None:
    """One by one: it slows kernels down to 20 seconds an op."""
    run = worker("device", name, command=("compute-sanitizer", "--error-exitcode", "86"))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert set(run.stdout.splitlines()) >= runs(name)


def surrounded(x: Tensor) -> Tensor:
    """The values in every second place, one off each edge, of a larger tensor of NaN."""
    if not x.is_floating_point() or x.numel() == 0:
        return x
    outer = x.new_full([2 * n + 2 for n in x.shape], float("nan"))
    inner = outer[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    return inner.copy_(x.detach())


@over(*ROW_OPS, name="tested")
def test_only_gradients_are_written(
    tested: RowOp, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and gradients in the midst of NaN: none is read, and none is overwritten."""
    module, device = (gpu, device) if backend == "triton" else (cpu, CPU)
    for sample in samples(tested, 23, device):
        rows = torch.Size([23])
        results = []
        for layout in (surrounded, torch.clone):
            inputs = changed(sample, layout)
            monkeypatch.setattr(Call, "new_gradients", new_gradients_by(layout))
            monkeypatch.setattr(zeros, "zeros_like", lambda x, by=layout: by(torch.zeros_like(x)))
            call = Call(tested, tuple(sorted(sample.params.items())), 0, rows)
            if tested.values:
                call = Call(tested, call.params, 1, rows)
            results.append(evaluated(module, call, inputs))
        for name, ours, expected in zip(("out", "d", "d"), *results, strict=False):
            assert ours.isfinite().all(), name
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7, msg=name)
        for gradient in results[0][1:]:
            n_inside = gradient.numel()
            outer = torch.as_strided(
                gradient, (gradient.untyped_storage().nbytes() // gradient.itemsize,), (1,), 0
            )
            assert outer.isnan().sum() == len(outer) - n_inside
            assert math.prod(2 * n + 2 for n in gradient.shape) == len(outer)


class OnlyInt64Indices(TorchDispatchMode):
    """Refuses the indices that torch refused before 2.13."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(("gather", "scatter", "index_select", "index_add")):
            assert args[2].dtype == torch.int64, f"{name} by {args[2].dtype}"
        return function(*args, **(kwargs or {}))


def narrowed(x: Tensor) -> Tensor:
    return x.to(torch.int32) if x.dtype == torch.int64 and x.dim() else x


@over(*REGISTRY.values(), name="tested")
def test_ops_take_int32_labels(tested: Formula, backend: str, device: torch.device) -> None:
    for sample in samples(tested, 15, device):
        inputs = changed(sample, narrowed).inputs
        with OnlyInt64Indices():
            tested(*inputs, **sample.params)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_dense_criteria_take_int32_labels(name: str, backend: str, device: torch.device) -> None:
    batch = BUILDERS[name](positives=0.3).on(device)
    criterion = made(batch, device)
    expected = mixed(criterion(**batch.inputs))
    inputs = mapped(lambda _, x: narrowed(x), batch.inputs)
    with OnlyInt64Indices():
        loss = mixed(criterion(**inputs))
        loss.backward()
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", ["detr", "dfine"])
@pytest.mark.parametrize("packed", [False, True])
def test_set_criteria_take_int32_labels(
    name: str, packed: bool, backend: str, device: torch.device
) -> None:
    inputs = Inputs([2, 0, 3], device, torch.float32)
    outputs, criterion = getattr(inputs, name)(*EXTRAS), criterion_of(name)
    expected = sum_losses(criterion(outputs, inputs.targets))
    targets: Any = [{**t, "labels": t["labels"].int()} for t in inputs.targets]
    outputs["dn_meta"] = mapped(lambda _, x: narrowed(x), outputs["dn_meta"])
    if packed:
        targets, outputs["dn_meta"] = criterion.prepare(targets, outputs["dn_meta"])
        targets = Targets(*(narrowed(x) for x in targets))
        outputs["dn_meta"] = mapped(lambda _, x: narrowed(x), outputs["dn_meta"])
    with OnlyInt64Indices():
        loss = sum_losses(criterion(outputs, targets))
    assert torch.equal(loss, expected)
