"""The run of `detloss bench`: every op, every criterion, and how cost grows, as JSON rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import machine
from .measure import Budget, Clock, Spread, alternate, clock_of, copy_bandwidth, counted_bytes
from .peers import peers_of
from .providers import (
    COMPILED,
    OURS,
    Absent,
    Provider,
    Run,
    Task,
    criterion_task,
    error_of,
    first_line,
    op_task,
    results,
    step,
    truth,
)
from .shapes import CRITERIA, QUICK_BATCH, SWEEPS, CriterionCase, OpCase, op_cases

FORMAT = 1
PASSES = ("forward", "forward+backward")
FULL, QUICK = Budget(rounds=15, seconds=2.0), Budget(rounds=3, seconds=0.1, most=5)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to run; `only` keeps the ops and criteria of these names, all if empty."""

    device: torch.device
    quick: bool = False
    only: Sequence[str] = ()

    @property
    def budget(self) -> Budget:
        return QUICK if self.quick else FULL

    def wants(self, name: str) -> bool:
        return not self.only or name.partition(",")[0] in self.only

    def batch(self, full: int) -> int:
        return QUICK_BATCH if self.quick else full


def names() -> list[str]:
    """What `Settings.only` chooses from."""
    cases = [case.name for case in op_cases()] + list(CRITERIA)
    return sorted({name.partition(",")[0] for name in cases})


@dataclass(frozen=True)
class Job:
    """One thing to time: a task, the same in float64 on the CPU, and what its rows say of it."""

    label: str
    task: Callable[[], Task]
    double: Callable[[], Task]
    about: Row
    passes: Sequence[str] = PASSES
    counts: bool = True
    compiled: bool = True


CPU = torch.device("cpu")


def op_job(case: OpCase, settings: Settings) -> Job:
    batch = settings.batch(case.size.batch)
    about = {"kind": "op", "name": case.name, "size": asdict(case.size) | {"batch": batch}}
    return Job(
        case.name,
        lambda: op_task(case, batch, settings.device),
        lambda: op_task(case, batch, CPU, torch.float64),
        about,
        PASSES if any(case.differentiable) else PASSES[:1],
        compiled=not settings.quick,
    )


def criterion_job(case: CriterionCase, settings: Settings) -> Job:
    batch = settings.batch(case.size.batch)
    about = {"kind": "criterion", "name": case.name, "size": asdict(case.size) | {"batch": batch}}
    return Job(
        case.name,
        lambda: criterion_task(case, settings.device, images=batch),
        lambda: criterion_task(case, CPU, torch.float64, images=batch),
        about,
        PASSES[:1] if case.matcher else PASSES,
        compiled=not settings.quick,
    )


def sweep_jobs(settings: Settings) -> Iterator[Job]:
    """A criterion at growing numbers of boxes, images, classes, layers; quick: the two smallest."""
    for sweep in SWEEPS:
        values = sweep.values[:2] if settings.quick else sweep.values
        for name, argument in sweep.argument.items():
            if not settings.wants(name):
                continue
            case = CRITERIA[name]
            for value in values:
                changes = {"images": settings.batch(sweep.batch), argument: value}
                about = {"kind": "sweep", "name": name, "axis": sweep.axis, "value": value}
                yield Job(
                    f"{name}, {value} {sweep.axis}",
                    lambda case=case, changes=changes: criterion_task(  # type: ignore[misc]
                        case, settings.device, **changes
                    ),
                    lambda case=case, changes=changes: criterion_task(  # type: ignore[misc]
                        case, CPU, torch.float64, **changes
                    ),
                    about,
                    PASSES[1:],
                    counts=False,
                    compiled=False,
                )


def jobs(settings: Settings) -> list[Job]:
    wanted_ops = [case for case in op_cases() if settings.wants(case.name)]
    wanted = [case for case in CRITERIA.values() if settings.wants(case.name)]
    return [
        *(op_job(case, settings) for case in wanted_ops),
        *(criterion_job(case, settings) for case in wanted),
        *sweep_jobs(settings),
    ]


Ready = dict[str, tuple[Provider, Run, float]]


def checked(task: Task, double: Task, compiled: bool) -> tuple[Ready, list[Row]]:
    """({provider's name: (provider, run, error)}, rows of those that are not timed, and why)."""
    true = truth(double)
    ready: Ready = {}
    refused: list[Row] = []
    for provider in (*OURS, *peers_of(task)):
        try:
            if provider.name == COMPILED and not compiled:
                raise Absent("left out of quick runs and of sweeps")
            run = provider.make(task)
            error = error_of(provider, run, task, true)
        except Absent as absent:
            refused.append({"provider": provider.name, "absent": str(absent)})
        except Exception as failure:
            refused.append({"provider": provider.name, "absent": f"fails: {first_line(failure)}"})
        else:
            if error <= task.tolerance:
                ready[provider.name] = (provider, run, error)
            else:
                reason = f"wrong: error {error:.1e}, allowed {task.tolerance:.0e}"
                refused.append({"provider": provider.name, "absent": reason, "error": error})
    return ready, refused


def bytes_of(task: Task, provider: Provider, run: Run, backward: bool) -> int:
    inputs = task.tensors()
    leaves = [x for x in inputs if x.requires_grad]
    outputs = results(provider, run, task)
    return counted_bytes(inputs, outputs[: len(outputs) - len(leaves)], leaves, backward)


def measure(job: Job, clock: Clock, settings: Settings, bandwidth: float) -> list[Row]:
    """A row for each pass and provider."""
    task = job.task()
    ready, refused = checked(task, job.double(), job.compiled)
    rows: list[Row] = [job.about | row for row in refused]
    if not ready:
        return rows
    counted = sum(x.nbytes for x in task.tensors())
    trees = task.copies(clock.copies(counted))
    for name in job.passes:
        backward = name == PASSES[1]
        steps = {key: step(p, run, trees, backward) for key, (p, run, _) in ready.items()}
        spreads = alternate(steps, clock, settings.budget)
        for key, (provider, run, error) in ready.items():
            row = job.about | {"provider": key, "pass": name, "error": error}
            row |= {"ms": asdict(spreads[key])}
            if task.kind == "op":
                # Not of criteria: what they read depends on what is matched.
                moved = bytes_of(task, provider, run, backward)
                row |= speed(moved, spreads[key], bandwidth)
            if job.counts:
                row |= {
                    "peak_mib": clock.peak_mib(steps[key]),
                    "launches": clock.launches(steps[key]),
                    "host_reads": clock.reads(steps[key]),
                }
            rows.append(row)
    return rows


def speed(moved: int, spread: Spread, bandwidth: float) -> Row:
    rate = moved / spread.median / 1e6
    return {"bytes": moved, "gb_per_s": rate, "of_copy_bandwidth": rate / bandwidth}


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as it is written to `bench.json`."""
    clock = clock_of(settings.device)
    report: dict[str, Any] = {
        "format": FORMAT,
        "quick": settings.quick,
        "machine": machine.describe(settings.device, clock),
        "copy_gb_per_s": copy_bandwidth(settings.device, clock),
        "rows": [],
    }
    with tqdm(jobs(settings), file=sys.stderr, desc="bench") as progress:
        for job in progress:
            progress.set_postfix_str(job.label)
            report["rows"] += measure(job, clock, settings, report["copy_gb_per_s"])
            torch.compiler.reset()
    return report


def write(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
