"""Several processes, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def torchrun(processes: int, *command: str, cwd: Path = TESTS) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node=<processes> <command>`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETLOSS_BACKEND": "torch"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *command],
        cwd=cwd,
        env=environment,
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
    """Uneven box counts, processes without any, one collective a step; DETR, ATSS and RTMDet."""
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
