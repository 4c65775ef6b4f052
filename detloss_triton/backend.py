"""Which backend runs: the only file that asks about devices or Triton.

`DETLOSS_BACKEND=auto|triton|torch` is read once, at import; another value is refused when a loss
asks for its backend, so that the command line starts and can say so. `auto` takes Triton for
tensors on a GPU where Triton can run, torch for all else; on a GPU it warns of that, once for each
reason. An explicit `triton` that cannot be honoured raises.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .warn import warn_once

Backend = Literal["auto", "triton", "torch"]
_BACKENDS: tuple[str, ...] = get_args(Backend)

# CUDA and ROCm tensors both call themselves "cuda".
_GPU_TYPES = ("cuda", "xpu")
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Looked for as files: an import would also find those of another copy that is installed.
_here = Path(__file__).parent
if _here.is_dir() and not any((_here / "kernels").glob("__init__.py*")):
    raise ImportError(
        "detloss_triton/kernels is a symlink to ../kernels, and here it is not: this checkout or "
        "archive was unpacked without symlinks. Remedy: git config core.symlinks true, then "
        "git checkout -- detloss_triton/kernels; or install a wheel"
    )

try:
    from . import kernels as kernels  # the one place that imports Triton

    _no_triton = ""
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    _no_triton = f"Triton cannot be imported ({error})"


def _why_no_compiler() -> str:
    """Why Triton will find nothing to build its launchers with; on Linux it looks just so."""
    named = os.environ.get("CC")
    candidates = ("gcc", "clang") if named is None else (named,)
    if platform.system() != "Linux" or any(map(shutil.which, candidates)):
        return ""
    looked = "found neither gcc nor clang" if named is None else f"CC={named!r} is no program"
    return f"Triton needs a C compiler to launch kernels, and at import {looked}"


_no_compiler = _why_no_compiler()

_requested: Backend = os.environ.get("DETLOSS_BACKEND", "auto")  # type: ignore[assignment]


def _check(name: str, source: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(_BACKENDS)}, got {name!r}")


def check_environment() -> None:
    """Raise ValueError where DETLOSS_BACKEND names no backend."""
    _check(_requested, "DETLOSS_BACKEND")


def use_backend(name: Backend) -> ExitStack:
    """Choose the backend of every loss from here on; as a context manager, until its end.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: for any other name. Whether "triton" can be honoured depends on the tensors, so
            that is checked, and refused with the reason, when a loss is computed.
    """
    _check(name, "backend")
    restore = ExitStack()
    restore.callback(_request, _requested)
    _request(name)
    return restore


def _request(name: Backend) -> None:
    global _requested
    _requested = name


def why_not_triton(
    device: torch.device, dtypes: Collection[torch.dtype] = (), hindrance: str = ""
) -> str:
    """The reason why Triton kernels cannot run on such tensors; empty if they can.

    Args:
        dtypes: of the values to compute with.
        hindrance: what else the caller knows to stand against them.
    """
    if _no_triton:
        return _no_triton
    if _launches is not None:
        return ""
    if hindrance:
        return hindrance
    if device.type == "cpu" and not _INTERPRETED:
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before the import"
    if device.type != "cpu" and device.type not in _GPU_TYPES:
        return f"Triton has no backend for device type {device.type!r}"
    # Intel's Triton looks for compilers of its own.
    if _no_compiler and not _INTERPRETED and device.type != "xpu":
        return _no_compiler
    if torch.float64 in dtypes:
        return "the kernels compute in float32 and would lose the precision of torch.float64"
    return ""


def choose(
    device: torch.device, dtypes: Collection[torch.dtype] = (), hindrance: str = ""
) -> Literal["triton", "torch"]:
    """The backend for tensors on `device`, for which see `why_not_triton`.

    Where "auto" takes torch on a GPU, it warns.

    Raises:
        RuntimeError: if "triton" was asked for by name and cannot run; it says why.
        ValueError: if DETLOSS_BACKEND names no backend.
    """
    chosen, reason = _decide(device, dtypes, hindrance)
    if reason:
        warn_of_torch(device, reason)
    return chosen


def may_be_triton(device: torch.device) -> bool:
    """Whether `choose` may answer "triton" for tensors there, of some types."""
    return _requested == "triton" or (_requested == "auto" and device.type != "cpu")


def _decide(
    device: torch.device, dtypes: Collection[torch.dtype] = (), hindrance: str = ""
) -> tuple[Literal["triton", "torch"], str]:
    """The backend, and why it is not Triton where "auto" would have liked that."""
    check_environment()
    if not may_be_triton(device):
        return "torch", ""
    reason = why_not_triton(device, dtypes, hindrance)
    if not reason:
        return "triton", ""
    if _requested == "triton":
        raise RuntimeError(f"backend 'triton' was requested but cannot run: {reason}")
    return "torch", reason


def warn_of_torch(device: torch.device, reason: str, kind: str = "") -> None:
    """Warn, once for each kind of reason, that "auto" takes the torch backend on a GPU."""
    if device.type in _GPU_TYPES:
        warn_once(
            f"detloss_triton computes on a GPU without its Triton kernels: {reason}. Said once for "
            'each reason, and never where DETLOSS_BACKEND=torch or use_backend("torch") asks for '
            "it.",
            kind or reason,
        )


def refuse_double(name: str, device: torch.device) -> None:
    """Raise RuntimeError, naming a float64 tensor, if "triton" was asked for: kernels have none."""
    if _requested == "triton" and (reason := why_not_triton(device, [torch.float64])):
        raise RuntimeError(
            f"{name} is torch.float64: backend 'triton' was requested but cannot run: {reason}"
        )


def is_auto() -> bool:
    """Whether no backend was asked for by name, so that either may run."""
    return _requested == "auto"


def is_cpu(device: torch.device) -> bool:
    """Whether this is a CPU: the host, whose memory it may look at, and whose caches matter."""
    return device.type == "cpu"


def graph_class(device: torch.device) -> Any:
    """The class of a graph of launches on a device; None where there is none, as on a CPU."""
    names = {"cuda": "CUDAGraph", "xpu": "XPUGraph"}
    return getattr(getattr(torch, device.type, None), names.get(device.type, ""), None)


def settings(device: torch.device) -> tuple[object, ...]:
    """What decides, besides the tensors, how a step there is computed: backend and autocast."""
    kind = device.type
    return _requested, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: all that ahead-of-time compilation needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_launches: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, on any device: results are left uninitialised."""
    global _launches, _requested
    before = _launches, _requested
    _launches, _requested = [], "triton"
    try:
        yield _launches
    finally:
        _launches, _requested = before


def _views(argument: Any) -> Any:
    """Views of the tensors, as autograd copies a gradient that somebody else holds too."""
    if isinstance(argument, torch.Tensor):
        return argument.detach()
    if isinstance(argument, tuple):  # of which most are strides
        return tuple(x if type(x) is int else _views(x) for x in argument)
    return argument


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the tensors' own device, which need not be the current one."""
    if _launches is not None:
        views = {name: _views(x) for name, x in arguments.items()}
        _launches.append(Launch(kernel, grid, views))
        return
    with _on(device):
        kernel[grid](**arguments)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return nullcontext()
    return module.device(device)


def versions() -> dict[str, str | None]:
    """Of this library and of what it stands on; None for a Triton that cannot be imported."""
    from . import __version__

    return {
        "detloss_triton": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if _no_triton else kernels.triton_version,
    }


def describe() -> list[tuple[str, str]]:
    """(label, value) rows: versions, devices, and which backend would run on each and why."""
    rows = [(name, version or _no_triton) for name, version in versions().items()]
    rows.append(("requested backend", _requested + " (interpreted kernels)" * _INTERPRETED))
    devices = [torch.device("cpu")]
    for kind in _GPU_TYPES:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            devices += [torch.device(kind, i) for i in range(module.device_count())]
    for device in devices:
        name = "CPU" if device.type == "cpu" else _device_name(device)
        reason = why_not_triton(device)
        try:
            verdict, _ = _decide(device)
        except RuntimeError:
            verdict = "torch"
            reason = f"refused: {reason}"
        if verdict == "torch" and not reason:
            reason = "requested" if _requested == "torch" else "auto keeps CPU tensors on torch"
        rows.append((f"{device} ({name})", f"{verdict}: {reason or 'Triton can run here'}"))
    return rows


def _device_name(device: torch.device) -> str:
    lookup: Callable[[torch.device], str] = torch.get_device_module(device).get_device_name
    return lookup(device)
