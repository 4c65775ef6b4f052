"""Both backends in one process: on a GPU compiled kernels, without one Triton's interpreter.

What cannot run on a machine is skipped, and says why: `TRITON_INTERPRET=0` without a GPU leaves
out all kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported, so set before anything imports detloss_triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from machine import DEVICE, TESTS, why_no_interpreter, why_no_kernels
from quick_interpreter import quicken

from detloss_triton import use_backend, warn

# Tiny work gains nothing from threads, and threads that wait for a busy core lose a lot.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-minutes",
        type=float,
        default=0.0,
        metavar="N",
        help="fuzz for N minutes with random seeds, instead of a fixed set of examples",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs on all cores; whole files, which share what they compile and train.

    What is named, a file or `-k`, runs in one process; and `-n` has the last word.
    """
    option = config.option
    whole = [Path(argument).resolve() for argument in config.args] == [TESTS]
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    decided = getattr(option, "numprocesses", 0) is not None  # by `-n`, or for want of xdist
    if not whole or option.keyword or is_worker or decided:
        return
    option.numprocesses, option.dist, option.loadscopereorder = "auto", "loadfile", False
    if torch.cuda.is_available():
        option.maxprocesses = 8  # each holds half a GiB of the GPU's memory


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """Each test hears the warnings that are said once in a process."""
    warn._said.clear()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels can run: compiled on a GPU, interpreted on the CPU."""
    return DEVICE


@pytest.fixture(scope="session")
def kernels() -> None:
    """For a test that runs kernels in this process, on `device`."""
    reason = why_no_kernels()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def interpreter() -> None:
    """For a test whose kernels are interpreted in a process of their own."""
    reason = why_no_interpreter()
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under each backend; its value is the backend's name."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin allocate with NaN: outputs left unwritten show.

    It comes with deterministic algorithms, and a GPU warns of those it lacks: tests ignore that.
    """
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn_only)
