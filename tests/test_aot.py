"""Kernels compile for GPUs that are not there, without spills and without local memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
KERNELS = {
    "assignment_kernel",
    "class_kernel",
    "delta_decode_kernel",
    "distance_decode_kernel",
    "distance_kernel",
    "distillation_kernel",
    "match_cost_kernel",
    "overlap_kernel",
    "task_aligned_kernel",
    "two_bin_kernel",
}


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("sm_80", "float32"), ("sm_90", "bfloat16"), ("sm_100", "float32"), ("gfx942", "float16")],
)
def test_no_kernel_spills(target: str, dtype: str) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    run = subprocess.run(
        [sys.executable, str(TESTS / "aot.py"), target, dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    spilled = [row for row in rows if row["local"] > 0]
    assert not spilled, spilled
