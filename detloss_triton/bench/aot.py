"""Compile a Triton launch ahead of time, for any target and without one, and read what it needs.

Knows Triton only: a launch is a kernel and the arguments it was called with.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs of the hardware.

    `local` is memory per thread that only looks like registers: stack, local arrays and spills.
    """

    registers: int
    local: int
    spills: int
    shared: int


def source(kernel: Any, arguments: Mapping[str, Any]) -> ASTSource:
    """The specialisation of the kernel that Triton's runtime would choose for the arguments."""
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
        # Elements of a tuple are specialised whatever is said of the parameter.
        specialised = len(path) > 1 or not parameter.do_not_specialize
        is_one = specialised and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(type_of(x, (*path, i), parameter) for i, x in enumerate(value))
        if isinstance(value, Tensor):
            kind, address = f"*{TYPES[value.dtype]}", value.data_ptr()
        else:
            kind, address = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if address % 16 == 0 and specialised:
            attributes[path] = ALIGNED
        return kind

    signature = {p.name: type_of(arguments[p.name], (i,), p) for i, p in enumerate(kernel.params)}
    return ASTSource(kernel, signature, constexprs, attributes)


def options(kernel: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The launch's arguments that are the compiler's: `num_warps` and its like."""
    return {name: value for name, value in arguments.items() if name not in kernel.arg_names}


def variant(kernel: Any, arguments: Mapping[str, Any]) -> str:
    """All that Triton compiles a kernel anew for."""
    chosen = source(kernel, arguments)
    specialised = (chosen.signature, chosen.constants, chosen.attrs)
    return str((kernel.__name__, specialised, options(kernel, arguments)))


def fingerprint(kernel: Any, arguments: Mapping[str, Any], target: str) -> str:
    """Of all that decides what the compiler makes: its version, the target, the kernel's source and
    that of the functions it calls, and how it is specialised."""
    decided = (triton.__version__, target, kernel.cache_key, variant(kernel, arguments))
    return hashlib.sha256(str(decided).encode()).hexdigest()[:16]


def tensors(value: Any) -> Iterator[Tensor]:
    """In a launch's arguments, alone and in tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)


def compiled(kernel: Any, arguments: Mapping[str, Any], target: GPUTarget) -> Any:
    """The launch compiled for the target, which need not be present."""
    return triton.compile(
        source(kernel, arguments), target=target, options=options(kernel, arguments)
    )


def usage(binary: Any) -> Usage:
    """Resources of a compiled kernel, as its binary declares them."""
    if binary.metadata.target.backend == "cuda":
        return _usage_of_cubin(binary.asm["cubin"], binary.metadata.shared)
    return _usage_of_amdgcn(binary.asm["amdgcn"])


Widths = dict[int, int]

# Of an instruction's suffixes, those that give its width in bits; without one it is 32.
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_AMDGCN_WIDTHS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "b128": 128,
    "b96": 96,
    "b64": 64,
    "b32": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "ubyte": 8,
    "sbyte": 8,
    "byte": 8,
}


def accesses(binary: Any) -> tuple[Widths, Widths]:
    """({width in bits: instructions} of loads, the same of stores) to the GPU's memory."""
    if binary.metadata.target.backend == "cuda":
        return _accesses_in_sass(_disassembled(binary.asm["cubin"], "-sass"))
    return _accesses_in_amdgcn(binary.asm["amdgcn"])


def _accesses_in_sass(text: str) -> tuple[Widths, Widths]:
    loads, stores = Counter[int](), Counter[int]()
    for name, suffixes in re.findall(r"\b(LDG|LDGSTS|STG)((?:\.\w+)+)", text):
        found = [_SASS_WIDTHS[s] for s in suffixes.split(".") if s in _SASS_WIDTHS]
        (stores if name == "STG" else loads)[found[0] if found else 32] += 1
    return dict(loads), dict(stores)


def operations(cubin: bytes) -> tuple[int, int]:
    """(instructions, those of them for transcendental functions) that a thread is given in its
    longest loop, or in all of a kernel without one."""
    return _operations_in_sass(_disassembled(cubin, "-sass"))


def _operations_in_sass(text: str) -> tuple[int, int]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]+);", text)
    code = [(int(address, 16), words) for address, words in found if not words.startswith("NOP")]
    loops = []
    for end, words in code:
        jump = re.match(r"BRA\b.*\b0x([0-9a-f]+)", words)
        # A kernel ends with a jump to itself, which is never reached.
        if jump and int(jump[1], 16) < end:
            loops.append([w for at, w in code if int(jump[1], 16) <= at <= end])
    taken = max(loops, key=len) if loops else [words for _, words in code]
    return len(taken), sum(words.startswith("MUFU") for words in taken)


def _accesses_in_amdgcn(text: str) -> tuple[Widths, Widths]:
    loads, stores = Counter[int](), Counter[int]()
    pattern = r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9]+)"
    for name, kind in re.findall(pattern, text):
        (stores if name == "store" else loads)[_AMDGCN_WIDTHS[kind]] += 1
    return dict(loads), dict(stores)


@functools.lru_cache
def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _disassembled(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_cuobjdump(), option, file.name], check=True, capture_output=True, text=True
        ).stdout


def _usage_of_cubin(cubin: bytes, shared: int) -> Usage:
    text = _disassembled(cubin, "-res-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    # Spills live on the stack: what ptxas calls LOCAL is what a program declared itself.
    local = int(found["STACK"]) + int(found["LOCAL"])
    return Usage(int(found["REG"]), local, local, shared)


def _usage_of_amdgcn(assembly: str) -> Usage:
    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no {name} in the kernel's metadata"
        return int(found.group(1))

    return Usage(
        registers=entry("vgpr_count"),
        local=entry("private_segment_fixed_size"),
        spills=entry("vgpr_spill_count") + entry("sgpr_spill_count"),
        shared=entry("group_segment_fixed_size"),
    )
