"""Benchmarks of every job and provider; a provider is timed only after its numbers are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from detloss_triton.bench import run
from detloss_triton.bench.measure import WARM_UP, Clock, Spread, clock_of, copy_bandwidth
from detloss_triton.bench.peers import peers_of
from detloss_triton.bench.providers import COMPILED, OURS, Absent, Provider, Task, step, truth


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("detloss")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--quick", action="store_true", help="one image, and nothing compiled")


def pytest_configure(config: pytest.Config) -> None:
    # A provider that is absent is skipped with its reason; that says enough.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


@dataclass(frozen=True)
class Timing:
    """One benchmark: a job's pass by one provider."""

    job: run.Job
    provider: Provider
    passed: str


def settings_of(config: pytest.Config) -> run.Settings:
    return run.Settings(torch.device(config.getoption("--device")), config.getoption("--quick"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    timings = [
        Timing(job, provider, passed)
        for job in metafunc.module.jobs(settings_of(metafunc.config))
        for provider in (*OURS, *peers_of(job.case))
        for passed in job.passes
    ]
    ids = [f"{t.job.label}-{t.provider.name}-{t.passed}" for t in timings]
    metafunc.parametrize("timing", timings, ids=ids)


@functools.lru_cache(maxsize=1)
def prepared(job: run.Job) -> tuple[Task, list[Tensor]]:
    """The job's task and its true results, kept for the next provider."""
    return job.task(), truth(job.double())


@functools.lru_cache
def roof(device: torch.device) -> tuple[Clock, float]:
    clock = clock_of(device)
    return clock, copy_bandwidth(device, clock)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Timing], None]:
    settings = settings_of(request.config)

    def time(timing: Timing) -> None:
        job, provider = timing.job, timing.provider
        if provider.name == COMPILED and settings.quick:
            pytest.skip("left out of quick runs")
        task, true = prepared(job)
        try:
            compute, error = run.checked(provider, task, true)
        except Absent as absent:
            pytest.skip(str(absent))
        backward = timing.passed == run.PASSES[1]
        clock, bandwidth = roof(settings.device)
        one = step(provider, compute, run.trees_of(task, clock), backward)

        def synchronized() -> None:
            one()
            clock.synchronize()

        benchmark.group = f"{job.label}, {timing.passed}"
        benchmark.pedantic(synchronized, rounds=settings.budget.rounds, warmup_rounds=WARM_UP)
        row = run.details(task, provider, compute, one, clock, backward)
        median = Spread.of(clock.time(one, settings.budget.rounds)).median
        row |= run.speed(row, median, bandwidth)
        benchmark.extra_info.update(job.about | row | {"error": error, "clock_ms": median})

    return time
