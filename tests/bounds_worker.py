"""Run by test_bounds.py: everything on hostile labels and counts, in memory between guard pages.

    python bounds_worker.py before|behind|device [planted | <op or criterion> ...]

`device` runs on a GPU as it is, for compute-sanitizer to watch. `planted` runs a
kernel that lacks a mask, to show that it is caught. Without a name everything runs.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

if "device" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from guarded import GuardedMemory, guarded
from quick_interpreter import quicken
from test_criteria import made
from test_detr import EXTRAS, Inputs, criterion_of
from torch import Tensor
from trees import leaves, mapped, mixed

import detloss_triton as dt
from detloss_triton import backend, engine
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.bench.batches import STRIDES
from detloss_triton.engine import REGISTRY, Formula, FusedOp, RowOp, formula

ROWS = 37
INTEGERS = (torch.int32, torch.int64)
SIDE: Any = sys.argv[1]
DEVICE = torch.device("cuda" if SIDE == "device" else "cpu")
# Of five classes the last and the first are here; else one off, far off, beyond 32 bits.
HOSTILE = (4, -1, 5, 0, 81, -7, 10**4, -(2**31), 2**31 - 1, 2**31, 2**40, -(2**40), 2**62)


def hostile(x: Tensor) -> Tensor:
    """Integers of the shape and dtype of x, most of them out of any range."""
    limits = torch.iinfo(x.dtype)
    values = [v for v in HOSTILE if limits.min <= v <= limits.max]
    return torch.tensor(values, dtype=x.dtype).repeat(x.numel() + 1)[: x.numel()].view(x.shape)


def placed(x: Tensor) -> Tensor:
    return x.to(DEVICE) if SIDE == "device" else guarded(x, SIDE)


def memory() -> AbstractContextManager[Any]:
    return nullcontext() if SIDE == "device" else GuardedMemory(SIDE)


def features_first(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def run_op(tested: Formula, integers: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    of_all = tested.samples(ROWS, torch.Generator().manual_seed(0))
    # Fused ops have masks of their own in one body, whatever the constants.
    for sample in itertools.islice(of_all, 1 if isinstance(tested, FusedOp) else None):
        inputs: Any = engine.mapped(
            lambda x: placed(layout(hostile(x.to(integers)) if x.dtype in INTEGERS else x)),
            sample.inputs,
        )
        inputs = tested.with_leaves(formula.Sample(inputs, sample.params))[0].inputs
        with memory():
            if not isinstance(tested, RowOp):
                out = tested(*inputs, **sample.params)
                if tested.differentiable:
                    out.sum().backward()
                continue
            weight = None if sample.weight is None else placed(sample.weight)
            for keep in (0, 1):
                tested(*inputs, weight=weight, keep=keep, **sample.params).sum().backward()


def run_dense(name: str) -> None:
    batch = BUILDERS[name](positives=0.3)

    def change(path: str, x: Tensor) -> Tensor:
        if x.is_floating_point() or x.dim() == 0 or x.dtype == torch.bool:
            return placed(x)
        return placed(hostile(x))

    inputs = mapped(change, batch.inputs)
    if name == "yolov9":
        inputs["targets"][..., 0] = placed(hostile(inputs["targets"][..., 0].long())).float()
    for path, x in leaves(inputs):
        if path.split(".")[0] in batch.differentiable:
            x.requires_grad_()
    criterion = made(batch, DEVICE)
    with memory():
        mixed(criterion(**inputs)).backward()


def run_matcher() -> None:
    """By itself, as a user or a module of another library calls it."""
    inputs = BUILDERS["yolov9"]().inputs
    targets = placed(inputs["targets"])
    targets[..., 0] = hostile(targets[..., 0].long())
    vec2box = dt.Vec2Box(None, (64, 64), list(STRIDES), DEVICE)
    classes, _, boxes = vec2box(mapped(lambda _, x: placed(x), inputs["main_preds"]))
    with memory():
        dt.BoxMatcher(5, vec2box.anchor_grid)(targets, (classes, boxes))


def run_set(name: str) -> None:
    inputs = Inputs([2, 0, 3], torch.device("cpu"), torch.float32)
    criterion = criterion_of(name)
    outputs = getattr(inputs, name)(*EXTRAS)
    packed, outputs["dn_meta"] = criterion.prepare(inputs.targets, outputs["dn_meta"])
    outputs["dn_meta"]["dn_positive_idx"] = hostile(outputs["dn_meta"]["dn_positive_idx"])
    packed = dt.Targets(hostile(packed.labels), packed.boxes, hostile(packed.counts))
    outputs, packed = (
        mapped(lambda _, x: placed(x.detach()).requires_grad_(x.requires_grad), x)
        for x in (outputs, packed._asdict())
    )
    with memory():
        dt.sum_losses(criterion(outputs, dt.Targets(**packed))).backward()


# By side: an op, the module of its kernel, the kernel, and a mask to take out of its source.
PLANTED = {
    "behind": ("binary_cross_entropy", "classes", "class_kernel", "m_row[:, None] & "),
    "before": ("match_cost", "matching", "match_cost_kernel", "(label >= 0) & "),
}


def plant(module: str, kernel: str, mask: str) -> None:
    """Replace a kernel by a copy without one of its masks."""
    original = getattr(backend.kernels, module)
    source = Path(original.__file__).read_text()
    assert mask in source
    path = Path(tempfile.mkdtemp(), "planted.py")
    path.write_text(source.replace(mask, ""))
    spec = importlib.util.spec_from_file_location("detloss_triton.kernels.planted", path)
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    setattr(original, kernel, getattr(planted, kernel))


def run(name: str) -> None:
    """An op or a criterion."""
    if name in REGISTRY:
        if SIDE != "before":
            run_op(REGISTRY[name], torch.int64, lambda x: x)
        if SIDE != "behind":
            run_op(REGISTRY[name], torch.int32, features_first)
    elif name in BUILDERS:
        run_dense(name)
    else:
        run_set(name)
    if name == "yolov9":
        run_matcher()


def main() -> None:
    torch.set_num_threads(1)
    quicken(pytest.MonkeyPatch())
    if "planted" in sys.argv:
        name, *error = PLANTED[SIDE]
        plant(*error)
        with backend.use_backend("triton"):
            run_op(REGISTRY[name], torch.int64, lambda x: x)
        return
    names = sys.argv[2:] or (*REGISTRY, *BUILDERS, "detr", "dfine")
    for chosen in ("triton", "torch"):
        with backend.use_backend(chosen):
            for name in names:
                run(name)
                print(chosen, name, flush=True)


main()
