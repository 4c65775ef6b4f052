"""Kernels compiled ahead of time for GPUs that are not there: from recorded launches to resources.

Run as a program, in a process without TRITON_INTERPRET: prints one JSON line per compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from detloss_triton import backend, ops  # noqa: F401  (ops fills the registry)
from detloss_triton.op import REGISTRY, RowOp
from detloss_triton.selfcheck import results

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_ALIGNED = [["tt.divisibility", 16]]


def launches(dtype: torch.dtype) -> list[backend.Launch]:
    """Every launch of every op on its samples, forward and backward."""
    with backend.record_launches() as recorded:
        for op in REGISTRY.values():
            for sample in op.samples(64, torch.Generator().manual_seed(0)):
                inputs = [
                    x.to(dtype) if x is not None and x.is_floating_point() else x
                    for x in sample.inputs
                ]
                if isinstance(op, RowOp):
                    results(op, sample, inputs)
                else:
                    op(*(x for x in inputs if x is not None), **sample.params)
        return list(recorded)


def source_of(launch: backend.Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a launch, specialised as its JIT would, and its options."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = _TYPES[value.dtype], _ALIGNED
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = _ALIGNED
    options = {"num_warps": launch.arguments.get("num_warps", 4)}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def resources(launch: backend.Launch, target: str) -> dict[str, Any]:
    """Registers, and bytes of local memory: stack, spills and scratch."""
    source, options = source_of(launch)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    row = {"kernel": launch.kernel.__name__, "target": target, "constants": describe(launch)}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, local = (
            int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return {**row, "registers": registers, "local": local}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    local = int(found["STACK"]) + int(found["LOCAL"])
    return {**row, "registers": int(found["REG"]), "local": local}


def describe(launch: backend.Launch) -> str:
    """A launch's compile-time constants, which tell its variants apart."""
    named = {p.name for p in launch.kernel.params if p.is_constexpr}
    return " ".join(f"{k}={v}" for k, v in sorted(launch.arguments.items()) if k in named)


def variants(dtype: torch.dtype) -> list[backend.Launch]:
    """One launch for each combination of kernel and constants."""
    return list({(launch.kernel, describe(launch)): launch for launch in launches(dtype)}.values())


def hardest(dtype: torch.dtype) -> list[backend.Launch]:
    """One launch per kernel and loss: the backward with the most gradients, or the only one."""
    picked: dict[tuple[Any, Any], backend.Launch] = {}
    for launch in variants(dtype):
        key = launch.kernel, launch.arguments.get("LOSS")
        if key not in picked or launch.arguments.get("BACKWARD"):
            picked[key] = launch
    return list(picked.values())


if __name__ == "__main__":
    dtype = getattr(torch, sys.argv[2])
    chosen = variants(dtype) if sys.argv[3:] == ["all"] else hardest(dtype)
    for launch in chosen:
        print(json.dumps(resources(launch, sys.argv[1])), flush=True)
