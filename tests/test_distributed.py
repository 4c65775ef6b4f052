"""Several processes, started as a user starts them."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from machine import CPU, TESTS, environment

from detloss_triton.demo import ranks


def torchrun(processes: int, *command: str, cwd: Path = TESTS) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node=<processes> <command>`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *command],
        cwd=cwd,
        env=environment(DETLOSS_BACKEND="torch"),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("processes", "counts"),
    [(2, ("5,1,0,2", "3,2,0,0", "0,0,0,4")), (3, ("1,0,0,0,4,7",))],
    ids=("2 processes", "3 processes"),
)
def test_gradients_are_those_of_the_whole_batch(processes: int, counts: tuple[str, ...]) -> None:
    """Uneven box counts, processes without any, one collective; DETR, D-FINE, ATSS, RTMDet."""
    run = torchrun(processes, str(TESTS / "ddp_worker.py"), *counts)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("agrees") == processes


def test_train_runs_under_torchrun(tmp_path: Path) -> None:
    """Two processes share the batches; one shows the bar, and writes what one alone writes."""
    size = ("--batch-size", "4", "--image-size", "64", "--device", "cpu")
    command = ("-m", "detloss_triton.cli", "train", "--steps", "2", *size)
    run = torchrun(2, *command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("wrote loss.png") == 1
    (output,) = (tmp_path / "runs").iterdir()
    assert {path.suffix for path in output.iterdir()} == {".png", ".json"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["losses"]["last"]["total_loss"] > 0


@pytest.mark.parametrize(
    ("device", "expected"),
    [(CPU, (("gloo",), {})), (torch.device("cuda"), ((), {"device_id": torch.device("cuda", 1)}))],
    ids=str,
)
def test_a_group_is_that_of_the_device(
    device: torch.device, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--device cpu` on a machine with a GPU too, where torch by itself takes the GPU's."""
    joined: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **kw: joined.append((a, kw)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    with ranks.group(device):
        assert joined == [expected]
