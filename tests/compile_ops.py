"""Compile the kernels of every op for the targets named, and print what each needs, as JSON.

A program of its own, since it needs Triton's compiler where the tests may need its interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import aot
import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.op import REGISTRY, Op, RowOp, Sample
from detloss_triton.ops import assignment, distribution

ROWS = 1000


def samples(op: Op) -> list[Sample]:
    return list(op.samples(ROWS, torch.Generator().manual_seed(0)))


def fullest(op: Op) -> Sample:
    """The sample with the most inputs."""
    return max(samples(op), key=lambda s: sum(x is not None for x in (*s.inputs, s.weight)))


def step(op: Op, sample: Sample, change: Callable[[Tensor], Tensor], keep: int = 0) -> None:
    """Forward and backward of a sample whose tensors are changed first."""
    inputs = [None if x is None else change(x).detach() for x in sample.inputs]
    if not isinstance(op, RowOp):
        op(*inputs, **sample.params)
        return
    for spec, x in zip(op.inputs, inputs, strict=True):
        if spec.grad and x is not None:
            x.requires_grad_()
    weight = None if sample.weight is None else change(sample.weight)
    op(*inputs, weight=weight, keep=keep, **sample.params).sum().backward()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def channels_first(x: Tensor) -> Tensor:
    """Rows in two dimensions whose features are far apart, as in (N, C, H, W) memory."""
    rows = x.unflatten(0, (10, ROWS // 10))
    if rows.dim() == 2:
        return rows
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def every_combination() -> None:
    """All samples in float32."""
    for op in REGISTRY.values():
        for sample in samples(op):
            step(op, sample, torch.clone)


def other_layouts_and_types() -> None:
    """Each row's loss in float16; sums of strided rows in bfloat16."""
    for op in REGISTRY.values():
        step(op, fullest(op), lambda x: cast(x.clone(), torch.float16), keep=isinstance(op, RowOp))
    strided_sums()


def strided_sums() -> None:
    for op in REGISTRY.values():
        if isinstance(op, RowOp):
            step(op, fullest(op), lambda x: channels_first(cast(x.clone(), torch.bfloat16)))
        else:
            step(op, fullest(op), lambda x: cast(x.clone(), torch.bfloat16))


def limits() -> None:
    """The widest rows that the launchers take, and large assignment problems.

    Not the largest: 4,096 columns keep 48 bytes on the stack on sm_90, which is known and cheap.
    """
    bins = distribution.MAX_BINS
    for name in ("two_bin", "distillation"):
        op = REGISTRY[name]
        sample = fullest(op)
        wide = tuple(
            torch.zeros(4, bins) if spec.features else x[:4]
            for x, spec in zip(sample.inputs, op.inputs, strict=True)
        )
        step(op, Sample(wide, sample.params, sample.weight[:4]), torch.clone)
    count = torch.zeros(1, dtype=torch.int64)
    for columns in (300, 1000, assignment._MAX_LONG // 2):
        REGISTRY["optimal_assignment"](torch.zeros(1, 8, columns), count, count)


PLANS: dict[str, list[Callable[[], None]]] = {
    "sm_80": [strided_sums],
    "sm_90": [every_combination, other_layouts_and_types, limits],
    "sm_100": [strided_sums],
    "gfx942": [strided_sums],
}


def jobs(target: str) -> Iterator[tuple[str, backend.Launch]]:
    """Each different specialisation of the target's plan, once."""
    seen = set()
    for plan in PLANS[target]:
        with backend.record_launches() as launches:
            plan()
        for launch in launches:
            arguments = (launch.kernel, launch.arguments)
            types = {k: v for k, v in aot.source(*arguments).signature.items() if v[0] == "*"}
            key = str((aot.constants(*arguments), aot.options(*arguments), types))
            if (launch.kernel.__name__, key) not in seen:
                seen.add((launch.kernel.__name__, key))
                yield target, launch


def measured(job: tuple[str, backend.Launch]) -> dict[str, Any]:
    target, launch = job
    binary = aot.compiled(launch.kernel, launch.arguments, aot.TARGETS[target])
    types = aot.source(launch.kernel, launch.arguments).signature.values()
    return {
        "target": target,
        "kernel": launch.kernel.__name__,
        "constants": aot.constants(launch.kernel, launch.arguments),
        "types": sorted({kind for kind in types if kind.startswith("*")}),
        **asdict(aot.usage(binary)),
    }


ALL: list[tuple[str, backend.Launch]] = []


def numbered(i: int) -> dict[str, Any]:
    return measured(ALL[i])


def main() -> None:
    torch.set_num_threads(1)
    for target in sys.argv[1:]:
        ALL.extend(jobs(target))
    # Forked, so that the launches and their kernels need no pickling.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        json.dump(pool.map(numbered, range(len(ALL)), chunksize=1), sys.stdout)


if __name__ == "__main__":
    main()
