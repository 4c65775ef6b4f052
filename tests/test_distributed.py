"""Several processes, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("processes", "counts"), [(2, "5,1,0,2"), (2, "3,2,0,0"), (3, "1,0,0,0,4,7")], ids=str
)
def test_gradients_are_those_of_the_whole_batch(processes: int, counts: str) -> None:
    """Uneven box counts, and one process without any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETLOSS_BACKEND": "torch"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(TESTS / "ddp_worker.py"), counts]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("agrees") == processes
