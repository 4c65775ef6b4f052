"""The run of `detloss bench`: every op, every criterion, and how cost grows, as JSON rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import machine
from .batches import BUILDERS
from .cases import CRITERIA, QUICK_BATCH, SWEEPS, CriterionCase, OpCase, op_cases
from .launches import launches_per_step
from .measure import Budget, Clock, Step, alternate, clock_of, copy_bandwidth, counted_bytes
from .peers import peers_of
from .providers import (
    COMPILED,
    OURS,
    Absent,
    Provider,
    Run,
    Task,
    Wrong,
    criterion_task,
    error_of,
    first_line,
    op_task,
    results,
    step,
    truth,
)

FORMAT = 1
PASSES = ("forward", "forward+backward")
FULL, QUICK = Budget(rounds=9, seconds=0.5), Budget(rounds=3, seconds=0.1, most=5)

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


@dataclass(frozen=True, eq=False)
class Job:
    """One thing to time: a task, the same in float64 on the CPU, and what its rows say of it."""

    label: str
    case: OpCase | CriterionCase
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
        case,
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
        case,
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
                    case,
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


def checked(provider: Provider, task: Task, true: Sequence[Tensor]) -> tuple[Run, float]:
    """How the provider computes the task, and its error, which is within what is allowed.

    Raises:
        Absent: where it cannot compute the task; it says why.
        Wrong: where it computes something else.
    """
    try:
        run = provider.make(task)
        error = error_of(provider, run, task, true)
    except Absent:
        raise
    except Exception as failure:
        raise Wrong(f"fails: {first_line(failure)}") from failure
    if not error <= task.tolerance:
        raise Wrong(f"wrong: error {error:.1e}, allowed {task.tolerance:.0e}")
    return run, error


def _those_to_time(task: Task, true: Sequence[Tensor], compiled: bool) -> tuple[Ready, list[Row]]:
    """(those whose numbers agree, rows of the others with the reason)."""
    ready: Ready = {}
    refused: list[Row] = []
    for provider in (*OURS, *peers_of(task.case)):
        try:
            if provider.name == COMPILED and not compiled:
                raise Absent("left out of quick runs and of sweeps")
            ready[provider.name] = (provider, *checked(provider, task, true))
        except (Absent, Wrong) as reason:
            refused.append({"provider": provider.name, "absent": str(reason)})
    return ready, refused


def trees_of(task: Task, clock: Clock) -> list[Any]:
    """The sets of inputs that a step takes in turn."""
    return task.copies(clock.copies(sum(x.nbytes for x in task.tensors())))


def details(
    task: Task, provider: Provider, run: Run, one: Step, clock: Clock, backward: bool
) -> Row:
    """What a step moves, holds, launches and waits for.

    No bytes for criteria: what they read depends on what is matched.
    """
    row: Row = {
        "peak_mib": clock.peak_mib(one),
        "launches": clock.launches(one),
        "host_reads": clock.reads(one),
    }
    if task.kind == "op":
        inputs = task.tensors()
        leaves = [x for x in inputs if x.requires_grad]
        outputs = results(provider, run, task)[: -len(leaves) or None]
        row["bytes"] = counted_bytes(inputs, outputs, leaves, backward)
    return row


def speed(row: Row, median: float, bandwidth: float) -> Row:
    """GB/s, and the fraction of a copy's, where bytes were counted."""
    if "bytes" not in row:
        return {}
    rate = row["bytes"] / median / 1e6
    return {"gb_per_s": rate, "of_copy_bandwidth": rate / bandwidth}


def measure(job: Job, clock: Clock, settings: Settings, bandwidth: float) -> list[Row]:
    """A row for each pass and provider."""
    task = job.task()
    ready, refused = _those_to_time(task, truth(job.double()), job.compiled)
    rows: list[Row] = [job.about | row for row in refused]
    trees = trees_of(task, clock)
    passes = {
        name: {key: step(p, run, trees, name == PASSES[1]) for key, (p, run, _) in ready.items()}
        for name in (job.passes if ready else ())
    }
    # All is timed before anything is counted: once dispatched through a mode that counts, what is
    # compiled runs as if it were not.
    timed = {name: alternate(steps, clock, settings.budget) for name, steps in passes.items()}
    for name, steps in passes.items():
        for key, (provider, run, error) in ready.items():
            spread = timed[name][key]
            row = job.about | {"provider": key, "pass": name, "error": error, "ms": asdict(spread)}
            if job.counts:
                backward = name == PASSES[1]
                row |= details(task, provider, run, steps[key], clock, backward)
                row |= speed(row, spread.median, bandwidth)
            rows.append(row)
    return rows


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as it is written to `bench.json`."""
    clock = clock_of(settings.device)
    report: dict[str, Any] = {
        "format": FORMAT,
        "quick": settings.quick,
        "machine": machine.describe(settings.device, clock),
        "copy_gb_per_s": copy_bandwidth(settings.device, clock),
        "launches_per_step": launches_per_step(filter(settings.wants, BUILDERS)),
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
