"""Every criterion at the sizes that people train at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detloss_triton.bench.cases import CRITERIA
from detloss_triton.bench.run import Job, Settings, criterion_job


def jobs(settings: Settings) -> list[Job]:
    return [criterion_job(case, settings) for case in CRITERIA.values()]


def test_criterion(timing: Any, timed: Callable[[Any], None]) -> None:
    timed(timing)
