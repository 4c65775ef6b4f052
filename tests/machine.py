"""What runs on this machine, and the reason why something does not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detloss_triton import backend

TESTS = Path(__file__).resolve().parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
# Where kernels run: compiled on a GPU, interpreted on the CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

needs_gpu = pytest.mark.skipif(DEVICE == CPU, reason="needs a GPU")
needs_triton = pytest.mark.skipif(backend.kernels is None, reason="needs Triton")


def environment(**changes: str | None) -> dict[str, str]:
    """For a process that is to find this checkout and the modules of its tests.

    Args:
        changes: variables to set; None for one that is to be left out.
    """
    path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **ours, **changes}
    return {name: value for name, value in variables.items() if value is not None}


@functools.cache
def why_no_interpreter() -> str:
    """Why a process with TRITON_INTERPRET=1 cannot run kernels; empty if it can."""
    if backend.kernels is None:
        return "no Triton"
    if INTERPRETED:
        import interpreter

        return interpreter.fault()
    run = subprocess.run(
        [sys.executable, TESTS / "interpreter.py"],
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stderr.strip() if run.returncode else ""


def why_no_kernels() -> str:
    """Why kernels cannot run in this process; empty if they can."""
    reason = backend.why_not_triton(DEVICE)
    if reason:
        return f"no kernels: {reason}"
    return why_no_interpreter() if DEVICE == CPU else ""
