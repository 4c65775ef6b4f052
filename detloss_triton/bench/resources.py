"""What every kernel needs of the GPUs we name, found without one, by compiling ahead of time.

Needs Triton's compiler, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from detloss_triton import backend, sum_losses
from detloss_triton.engine import REGISTRY, Formula, RowOp, Sample
from detloss_triton.ops import assignment, distribution

from . import aot
from .batches import Draw
from .cases import CRITERIA, CriterionCase, op_cases
from .measure import n_bytes
from .report import aligned
from .trees import leaves

TARGETS = tuple(aot.TARGETS)
# The target whose plan is complete, also when it is quick.
MAIN = "sm_90"
# Rows of the variants that have no named size, and the images among which they are divided.
ROWS, IMAGES = 1600, 10
# Rows of an image that nothing divides: no two can be read together.
RAGGED_ROWS = 25 * IMAGES
# By kernel, the argument that says how many logits of a row it takes at a time: those of a step of
# its loop, or of a whole row.
LOGITS = {"class_kernel": "BC", "two_bin_kernel": "n_features", "distillation_kernel": "n_features"}
MANY_QUERIES = "optimal_assignment, 300 x 600"
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One call of an op: what its launches are called in the report, and their arguments."""

    op: Formula
    label: str
    sample: Sample
    keep: int = 0

    def launches(self) -> list[backend.Launch]:
        """Recorded, not run: forward, and backward where the op has one."""
        op: Any = self.op
        sample, leaves = op.with_leaves(self.sample)
        of_rows = {"weight": sample.weight, "keep": self.keep} if isinstance(op, RowOp) else {}
        with backend.record_launches() as launches:
            out = op(*sample.inputs, **of_rows, **sample.params)
            if leaves:
                torch.autograd.grad(out.sum(), leaves)
        return launches


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _channels_first(x: Tensor) -> Tensor:
    """Rows in two dimensions whose features are far apart, as in (N, C, H, W) memory."""
    rows = x.unflatten(0, (IMAGES, -1))
    if rows.dim() == 2:
        return rows
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def _samples(op: Formula, rows: int = ROWS) -> list[Sample]:
    return list(op.samples(rows, torch.Generator().manual_seed(0)))


def _fullest(op: Formula, rows: int = ROWS) -> Sample:
    """The sample with the most inputs."""
    return max(_samples(op, rows), key=lambda s: sum(x is not None for x in (*s.inputs, s.weight)))


def named(batch: int | None = None) -> Iterator[Variant]:
    """Every op at its named sizes, contiguous float32; the batch is the size's own or the given."""
    for case in op_cases():
        yield Variant(case.op, case.name, case.sample(Draw(0), batch or case.size.batch))


def strided(rows: int = ROWS) -> Iterator[Variant]:
    """Sums of rows as heads give them, (N, C, H, W), in bfloat16: the most registers."""
    for op in REGISTRY.values():
        if isinstance(op, RowOp):
            sample = _fullest(op, rows).changed(lambda x: _channels_first(_cast(x, torch.bfloat16)))
            yield Variant(op, f"{op.name}, channels first, {rows // IMAGES} rows, bfloat16", sample)


@dataclass(frozen=True)
class Step:
    """A criterion's step at its named size, with predictions of a dtype; one image."""

    case: CriterionCase
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.case.name} step, {str(self.dtype).removeprefix('torch.')}"

    def launches(self) -> list[backend.Launch]:
        meta = torch.device("meta")
        batch = self.case.batch(images=1).on(meta, self.dtype)
        wanted = [x for _, x in leaves(batch.inputs) if x.requires_grad]
        with backend.record_launches() as launches:
            torch.autograd.grad(sum_losses(batch.criterion(meta)(**batch.inputs)), wanted)
        return launches


def steps(*dtypes: torch.dtype) -> Iterator[Step]:
    """A step of every criterion."""
    for dtype in dtypes:
        yield from (Step(case, dtype) for case in CRITERIA.values() if not case.matcher)


def each_row() -> Iterator[Variant]:
    """Each row's loss, in float16."""
    for op in REGISTRY.values():
        sample = _fullest(op).changed(lambda x: _cast(x, torch.float16))
        yield Variant(op, f"{op.name}, each row, float16", sample, keep=isinstance(op, RowOp))


def combinations() -> Iterator[Variant]:
    """All samples in float32."""
    for op in REGISTRY.values():
        for i, sample in enumerate(_samples(op)):
            yield Variant(op, f"{op.name}, sample {i}", sample)


def without_labels() -> Iterator[Variant]:
    """Class losses whose entries have targets of their own."""
    for op in REGISTRY.values():
        if isinstance(op, RowOp) and op.background:
            sample = next(s for s in _samples(op) if s.inputs[1] is None)
            sample = sample.changed(Tensor.contiguous)
            yield Variant(op, f"{op.name}, without labels", sample)


def limits() -> Iterator[Variant]:
    """The widest rows that the launchers take, and large assignment problems.

    Not the largest: 4,096 columns keep 48 bytes on the stack on sm_90, which is known and cheap.
    """
    bins = distribution.MAX_BINS
    for name in ("two_bin", "distillation"):
        op = REGISTRY[name]
        assert isinstance(op, RowOp)
        sample = _fullest(op)
        wide = tuple(
            torch.zeros(4, bins) if spec.features else x[:4]
            for x, spec in zip(sample.inputs, op.inputs, strict=True)
            if x is not None
        )
        assert sample.weight is not None
        wide_sample = Sample(wide, sample.params, sample.weight[:4])
        yield Variant(op, f"{name}, {bins} bins", wide_sample)
    count = torch.zeros(1, dtype=torch.int64)
    for columns in (1000, assignment._MAX_LONG // 2):
        sample = Sample((torch.zeros(1, 8, columns), count, count))
        yield Variant(
            REGISTRY["optimal_assignment"], f"optimal_assignment, {columns} columns", sample
        )


def _one_per_kernel(variants: Iterator[Variant | Step]) -> Iterator[Variant | Step]:
    seen: set[str] = set()
    for variant in variants:
        kernels = {launch.kernel.__name__ for launch in variant.launches()}
        if not kernels <= seen:
            seen |= kernels
            yield variant


def plan(target: str, quick: bool) -> Iterator[Variant | Step]:
    """What is compiled for a target. Quick: all named ops for one target, and class losses without
    labels; for the others one contiguous op of each kernel, backward where there is one, assignment
    to many queries, and for the first target strided ones."""
    if not quick:
        yield from named()
        yield from strided()
        yield from strided(RAGGED_ROWS)
        yield from steps(torch.float32, torch.bfloat16)
        if target == MAIN:
            yield from each_row()
            yield from combinations()
            yield from limits()
    elif target == MAIN:
        yield from named(batch=1)
        yield from without_labels()
    else:
        yield from _one_per_kernel(named(batch=1))
        yield next(v for v in named(batch=1) if v.label == MANY_QUERIES)
        if target == TARGETS[0]:
            yield from _one_per_kernel(strided())


def _bytes_per_element(launch: backend.Launch) -> float:
    """Of the tensors that the launch reads or writes, per element of the largest."""
    tensors = {x.data_ptr(): x for x in aot.tensors([*launch.arguments.values()])}
    elements = max(x.numel() for x in tensors.values())
    return sum(map(n_bytes, tensors.values())) / max(elements, 1)


def jobs(targets: tuple[str, ...], quick: bool) -> Iterator[tuple[Row, backend.Launch]]:
    """Each different specialisation of a target's plan once, and what its row begins with."""
    for target in targets:
        seen = set()
        for variant in plan(target, quick):
            for launch in variant.launches():
                upstream = {"dout", "p_dout"} & {*launch.arguments}
                backward = any(launch.arguments[name] is not None for name in upstream)
                if quick and target != MAIN and not backward and upstream:
                    continue
                key = aot.variant(launch.kernel, launch.arguments)
                if key in seen:
                    continue
                seen.add(key)
                yield (
                    {
                        "target": target,
                        "variant": variant.label,
                        "pass": "backward" if backward else "forward",
                        "kernel": launch.kernel.__name__,
                        "types": sorted(
                            {
                                f"*{aot.TYPES[x.dtype]}"
                                for x in aot.tensors([*launch.arguments.values()])
                            }
                        ),
                        "programs": math.prod(launch.grid),
                        "bytes_per_element": round(_bytes_per_element(launch), 2),
                        "made_of": aot.fingerprint(launch.kernel, launch.arguments, target),
                    },
                    launch,
                )


def _per_logit(launch: backend.Launch, binary: Any) -> Row:
    """Instructions and transcendental ones (MUFU) per logit, of kernels over logits."""
    name = launch.kernel.__name__
    if name not in LOGITS:
        return {}
    threads = 32 * binary.metadata.num_warps
    logits = launch.arguments["BR"] * launch.arguments[LOGITS[name]] / threads
    counts = aot.operations(binary.asm["cubin"])
    return {
        key: round(n / logits, 2) for key, n in zip(("instructions", "mufu"), counts, strict=True)
    }


_JOBS: list[tuple[Row, backend.Launch]] = []


def _measured(i: int) -> Row:
    row, launch = _JOBS[i]
    binary = aot.compiled(launch.kernel, launch.arguments, aot.TARGETS[row["target"]])
    loads, stores = aot.accesses(binary)
    found = row | asdict(aot.usage(binary)) | {"loads": loads, "stores": stores}
    return found | (_per_logit(launch, binary) if row["target"] == MAIN else {})


def measure(
    targets: tuple[str, ...] = TARGETS, quick: bool = False, known: Sequence[Row] = ()
) -> list[Row]:
    """A row for each kernel specialisation and target; what is known is not compiled again."""
    before = {row.get("made_of"): row for row in known}
    rows = list(jobs(targets, quick))
    _JOBS[:] = [(row, launch) for row, launch in rows if row["made_of"] not in before]
    # Forked, so that the launches and their kernels need no pickling.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        found = pool.imap(_measured, range(len(_JOBS)))
        shown = tqdm(found, file=sys.stderr, desc="compile", total=len(_JOBS))
        before |= {row["made_of"]: row for row in shown}
    return [before[row["made_of"]] | row for row, _ in rows]


def read(path: Path) -> list[Row]:
    """The rows that `write` wrote; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(rows: list[Row], path: Path) -> None:
    """As JSON, one row a line: a baseline that is compared by eye as well."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    version = triton.__version__
    path.write_text(f'{{"triton": "{version}", "rows": [\n{lines}\n]}}\n')


def table(rows: list[Row]) -> str:
    """One line for each kernel specialisation and target."""
    head = ("target", "variant", "pass", "registers", "shared", "local", "spills", "loads")
    tail = ("stores", "programs", "bytes/element", "instructions/logit", "MUFU/logit")
    lines: list[tuple[str, ...]] = [(*head, *tail)]
    for row in rows:
        lines.append(
            (
                row["target"],
                row["variant"],
                row["pass"],
                *(str(row[key]) for key in ("registers", "shared", "local", "spills")),
                *(widths(row[key]) for key in ("loads", "stores")),
                str(row["programs"]),
                f"{row['bytes_per_element']:g}",
                *(f"{row[key]:g}" if key in row else "-" for key in ("instructions", "mufu")),
            )
        )
    return aligned(lines)


def widths(counted: aot.Widths) -> str:
    """As in `2x128 1x32`: instructions by their width in bits, widest first."""
    pairs = sorted(((int(bits), n) for bits, n in counted.items()), reverse=True)
    return " ".join(f"{n}x{bits}" for bits, n in pairs) or "-"
