"""The command line: `detloss info`, `detloss check`, `detloss train` and `detloss bench`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import backend, validate
from .demo.detectors import RECIPES
from .demo.samples import InputError

EXIT_FAILED_CHECK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
# The modules of an extra, by the command that needs them.
MODULES_OF = {
    "train": ("demo", ("matplotlib", "PIL", "pycocotools", "tqdm")),
    "bench": ("bench", ("matplotlib", "tqdm")),
}
COARSEST_STRIDE = 32
LARGEST_SEED = 2**63 - 1


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 for a failed check, 2 for bad input, 130 when interrupted."""
    name = "detloss"
    try:
        options = _parser().parse_args(arguments)
        name = f"detloss {options.command}"
        _check_environment()
        code: int = options.run(options)
    except InputError as error:
        # Reasons that come from elsewhere may span lines.
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="detloss",
        description="Training losses of object detectors in PyTorch.",
        # The other formatters would join the lines of --version.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = backend.versions().items()
    parser.add_argument(
        "--version",
        action="version",
        version="\n".join(f"{name} {found or 'cannot be imported'}" for name, found in versions),
        help="versions of this library, Python, torch and Triton",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help="versions, devices, which backend would run and why")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="compare every op with its reference, here")
    check.set_defaults(run=_check)

    train = commands.add_parser(
        "train",
        help="train a small detector and draw how it went",
        description="Train a small detector on shapes drawn on the fly, or on images in COCO "
        "format; write loss.png, predictions.png and metrics.json.",
    )
    train.set_defaults(run=_train)
    add = train.add_argument
    add("--images", type=Path, metavar="DIR", help="train on the images in this directory")
    add(
        "--annotations",
        type=Path,
        metavar="JSON",
        help="their boxes, in COCO format, of the pictures turned upright as EXIF data say",
    )
    add("--criterion", choices=sorted(RECIPES), default="yolov9", help="default: %(default)s")
    add("--steps", type=_positive, metavar="N", help=f"batches to train on; {_default_steps()}")
    add("--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s")
    add(
        "--image-size",
        type=_image_size,
        default=160,
        metavar="N",
        help="side in pixels of the square that images are scaled to; default: %(default)s",
    )
    add("--seed", type=_seed, default=0, metavar="N", help="default: %(default)s")
    # Threads that share cores with another program wait for each other at every layer, which can
    # cost far more than they bring; and their number changes the last digits of the losses.
    add(
        "--threads", type=_positive, default=1, metavar="N", help="on the CPU; default: %(default)s"
    )
    add(
        "--graphed",
        action="store_true",
        help="replay the criterion as graphs of launches; changes nothing on a CPU",
    )
    add("--output", type=Path, metavar="DIR", help="where to write; default: runs/<time>")

    bench = commands.add_parser(
        "bench",
        help="time every op and criterion, here, against its peers",
        description="Time every op and criterion on this machine against its peers; print a table, "
        "write bench.json and pictures. The extra `bench` installs the peers.",
    )
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    add("--quick", action="store_true", help="one image, few rounds: a minute on two cores")
    add(
        "--aot",
        action="store_true",
        help="time nothing: compile every kernel for the GPUs we name, without one; report "
        "registers, shared and local memory, load and store widths; what aot.json in --output has "
        "of the same source and compiler is taken from there",
    )
    add("--only", nargs="+", default=(), metavar="NAME", help="these ops and criteria alone")
    add("--output", type=Path, metavar="DIR", help="where to write; default: runs/bench-<time>")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD.json", "NEW.json"),
        help="time nothing: print the ratios of two reports",
    )
    for command in (check, train, bench):
        command.add_argument(
            "--device", type=_device, help="default: an accelerator if there is one, else cpu"
        )
    for command in (check, train):
        command.add_argument(
            "--backend",
            choices=("auto", "triton", "torch"),
            help="default: the environment's DETLOSS_BACKEND, else auto",
        )
    return parser


def _check_environment() -> None:
    try:
        backend.check_environment()
        validate.check_environment()
    except ValueError as error:
        raise InputError(str(error)) from None


def _info(options: argparse.Namespace) -> int:
    rows = backend.describe()
    width = max(len(label) for label, _ in rows)
    rows.append(("validation", "on" if validate.enabled() else "off"))
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from .selfcheck import check

    device = options.device or _default_device()
    with _backend(options.backend):
        _chosen_backend(device)
    rows = [row for row in check(device) if options.backend in (None, "auto", row.backend)]
    table = [("op", "backend", "dtype", "max error", "tolerance", "")]
    for row in rows:
        error, tolerance = f"{row.error:.1e}", f"{row.tolerance:.1e}"
        table.append(
            (row.op, row.backend, row.dtype, error, tolerance, "ok" if row.ok else "FAILED")
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows)} checks on {device}, {failed} failed")
    return EXIT_FAILED_CHECK if failed else 0


def _train(options: argparse.Namespace) -> int:
    with _extra("train"):
        from .demo.train import Settings, train
    if (options.images is None) != (options.annotations is None):
        given, missing = "--images", "--annotations"
        if options.images is None:
            given, missing = missing, given
        raise InputError(f"{given} also needs {missing}: expected both or neither")
    device = options.device or _default_device()
    with _backend(options.backend):
        train(
            Settings(
                criterion=options.criterion,
                steps=options.steps or RECIPES[options.criterion].steps,
                batch_size=options.batch_size,
                image_size=options.image_size,
                seed=options.seed,
                backend=_chosen_backend(device),
                device=device,
                threads=options.threads,
                output=options.output or Path("runs", time.strftime("%Y%m%d-%H%M%S")),
                graphed=options.graphed,
                images=options.images,
                annotations=options.annotations,
            )
        )
    return 0


@contextmanager
def _extra(command: str) -> Iterator[None]:
    """Say which extra to install where one of its modules is missing."""
    extra, modules = MODULES_OF[command]
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in modules:
            raise
        raise InputError(
            f'{error.name} is not installed: pip install "detloss_triton[{extra}]"'
        ) from None


def _bench(options: argparse.Namespace) -> int:
    with _extra("bench"):
        from .bench import pictures, report, run
    if options.compare:
        try:
            print(report.comparison(*map(report.read, options.compare)))
        except report.ReportError as error:
            raise InputError(str(error)) from None
        return 0
    unknown = sorted(set(options.only) - set(run.names()))
    if unknown:
        raise InputError(f"--only: expected names among {', '.join(run.names())}, got {unknown[0]}")
    output = options.output or Path("runs", time.strftime("bench-%Y%m%d-%H%M%S"))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {output}: {error.strerror}") from None
    if options.aot:
        return _ahead_of_time(options.quick, output)
    device = options.device or _default_device()
    found = run.run(run.Settings(device, options.quick, options.only))
    print(report.heading(found))
    print(report.table(found))
    run.write(found, output / "bench.json")
    for path in (output / "bench.json", *pictures.draw(found, output)):
        print(f"wrote {path}")
    return 0


def _ahead_of_time(quick: bool, output: Path) -> int:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise InputError("--aot: expected Triton's compiler, but TRITON_INTERPRET=1 replaces it")
    try:
        from .bench import resources
    except ImportError as error:
        raise InputError(f"--aot needs Triton: {error}") from None
    rows = resources.measure(quick=quick, known=resources.read(output / "aot.json"))
    print(resources.table(rows))
    resources.write(rows, output / "aot.json")
    spilling = [row for row in rows if row["local"] or row["spills"]]
    print(f"wrote {output / 'aot.json'}: {len(rows)} kernels, {len(spilling)} use local memory")
    return EXIT_FAILED_CHECK if spilling else 0


def _backend(name: Any) -> AbstractContextManager[object]:
    return nullcontext() if name is None else backend.use_backend(name)


def _chosen_backend(device: torch.device) -> str:
    try:
        return backend.choose(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--backend: {error}") from None


def _default_steps() -> str:
    steps = (f"{recipe.steps} for {name}" for name, recipe in RECIPES.items())
    return f"default: {', '.join(steps)}"


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        # Only a value that comes back shows that the device is there and computes.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(
            f"expected a device that torch can use here, such as cpu or cuda, got {text!r}"
        ) from None
    return device


def _whole(text: str, lowest: int, highest: float, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if not lowest <= number <= highest:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def _positive(text: str) -> int:
    return _whole(text, 1, float("inf"), "a positive whole number")


def _seed(text: str) -> int:
    return _whole(text, 0, LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}")


def _image_size(text: str) -> int:
    # Two cells of the coarsest level are the least that batch normalisation of one image can use.
    lowest = 2 * COARSEST_STRIDE
    expected = f"a multiple of {COARSEST_STRIDE}, at least {lowest}"
    size = _whole(text, lowest, float("inf"), expected)
    if size % COARSEST_STRIDE:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return size


if __name__ == "__main__":
    sys.exit(main())
