"""Every op of the registry at its named sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detloss_triton.bench.cases import op_cases
from detloss_triton.bench.run import Job, Settings, op_job


def jobs(settings: Settings) -> list[Job]:
    return [op_job(case, settings) for case in op_cases()]


def test_op(timing: Any, timed: Callable[[Any], None]) -> None:
    timed(timing)
