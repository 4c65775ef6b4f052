"""Behind OTX's own heads and assigners, a swap of criteria changes no loss and no gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOLERANCE = 2e-4

needs_otx = pytest.mark.skipif(
    "OTX_ROOT" not in os.environ,
    reason="needs OTX_ROOT, the wheel of `pip download --no-deps otx==2.3.0`",
)


@needs_otx
def test_criteria_stand_in_for_otx_s() -> None:
    """With all their parts ours, or only the criterion; what the heads hand over is legal."""
    run = subprocess.run(
        [sys.executable, HERE / "otx_heads.py"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "DETLOSS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    batches = run.stdout.splitlines()
    # Four sets of box counts, ATSS's with and without ignored labels, twice each.
    assert len(batches) == 4 * (2 + 1 + 1 + 1) * 2
    assert not [line for line in batches if not float(line.rpartition(" ")[2]) <= TOLERANCE]
