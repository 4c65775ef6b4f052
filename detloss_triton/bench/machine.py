"""What the figures were measured on: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from detloss_triton.backend import versions

from .measure import Clock

_PACKAGES = ("numpy", "otx", "scipy", "torchvision", "transformers", "torch-linear-assignment")


def describe(device: torch.device, clock: Clock) -> dict[str, Any]:
    """The JSON's head; nothing in it names a path or a user."""
    return {
        "device": str(device),
        "name": _cpu_name() if device.type == "cpu" else clock.device_name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {
            name: version
            for name, version in (versions() | {p: _version(p) for p in _PACKAGES}).items()
            if version
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked if its code was changed; None where there is no checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie in a checkout of something else.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        code = (":/detloss_triton", ":/kernels")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
