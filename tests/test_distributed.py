"""Several processes, started as a user starts them."""

from __future__ import annotations

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
