"""Every op's kernels compile for the GPUs we name, without one, and fit into registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from detloss_triton import op, ops  # noqa: F401  (ops fills the registry)

HERE = Path(__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

KERNEL = re.compile(r"def (\w+_kernel)\(")

Kernels = list[dict[str, Any]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """What each kernel needs on each target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A cache of our own: nothing compiled earlier, nor by another version, is taken for new.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, HERE / "compile_ops.py", *TARGETS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_stay_in_registers(target: str, kernels: Kernels) -> None:
    """No spills, no local memory."""
    ours = [kernel for kernel in kernels if kernel["target"] == target]
    assert ours
    for kernel in ours:
        assert 0 < kernel["registers"] <= 255, kernel
    spilling = [kernel for kernel in ours if kernel["local"] or kernel["spills"]]
    assert not spilling, "\n".join(map(str, spilling))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(target: str, kernels: Kernels) -> None:
    """Forward and backward of each row op; on one target in every dtype."""
    count = Counter(kernel["kernel"] for kernel in kernels if kernel["target"] == target)
    sources = [path.read_text() for path in (HERE.parent / "kernels").glob("*.py")]
    assert count.keys() == {name for text in sources for name in KERNEL.findall(text)}
    n_row_ops = sum(isinstance(each, op.RowOp) for each in op.REGISTRY.values())
    assert count.total() >= 2 * n_row_ops + len(op.REGISTRY) - n_row_ops
    if target == "sm_90":
        types = {t for kernel in kernels for t in kernel["types"] if kernel["target"] == target}
        assert {"*fp32", "*fp16", "*bf16"} <= types
