"""The house: who imports whom, who asks about devices and compilers, and how wide kernels are."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import TESTS
from torch import nn

import detloss_triton as dt

ROOT = TESTS.parent
PACKAGE = ROOT / "detloss_triton"

# From the ground up: a module imports from its own floor or from those below it.
FLOORS = (
    ("warn", "precision", "ranks", "settings", "kernels"),
    ("backend", "boxes", "shapes"),
    ("recorder", "signature"),
    ("engine",),
    ("validate", "reduction", "once"),
    ("ops",),
    ("losses", "functional", "coders", "matchers", "targets", "vec2box", "anchors", "assigners"),
    ("denoising",),
    ("criteria",),
    ("detectors",),
    ("graphs", "recorded", "integrations"),
    ("", "selfcheck"),
    ("cli", "demo", "bench", "__main__"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it; "" is the package itself."""
    found = {}
    # The kernels' folder is a symlink, which rglob does not follow.
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The package's modules that one imports when it is itself imported."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in when_imported(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
            yield from (s.partition(".")[2] for s in sources if s.startswith("detloss_triton"))
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join(part for part in ("detloss_triton", *above, source) if part)
            if source.split(".")[0] == "detloss_triton":
                inside = source.partition(".")[2]
                for alias in node.names:
                    whole = ".".join(part for part in (inside, alias.name) if part)
                    yield whole if whole in MODULES else inside


def when_imported(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run at import: not those in functions, nor for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from when_imported(node)


GRAPH = {name: {other for other in imported(name) if other != name} for name in MODULES}


def floor_of(name: str) -> int:
    top = name.partition(".")[0]
    return next(i for i, names in enumerate(FLOORS) if top in names)


def test_imports_go_down() -> None:
    assert sum(map(len, GRAPH.values())) > 100
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if floor_of(other) > floor_of(name)
    ]
    assert not wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The paths that lead back to where they began."""
    found, done = [], set[str]()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def test_no_imports_run_in_a_circle() -> None:
    assert circles(GRAPH) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


# Each module in a process of its own, forked from one that has torch and the kernels, which import
# nothing of ours. The package itself is left out: it imports all modules in an order in which no
# circle may show.
ALONE = """
import importlib, os, sys, types
import numpy, scipy.optimize, torch, triton

package, *names = sys.argv[1:]
sys.modules["detloss_triton"] = types.ModuleType("detloss_triton")
sys.modules["detloss_triton"].__path__ = [package]
import detloss_triton.kernels
children = {}
for name in names:
    child = os.fork()
    if child == 0:
        importlib.import_module(f"detloss_triton.{name}")
        os._exit(0)
    children[child] = name
for child, name in children.items():
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_first() -> None:
    pytest.importorskip("triton")
    optional = ("demo", "bench", "cli", "__main__")  # with further packages, or run as a program
    names = [name for name in MODULES if name and name.partition(".")[0] not in optional]
    assert len(names) > 40
    run = subprocess.run(
        [sys.executable, "-c", ALONE, PACKAGE, *names], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and not run.stdout, run.stdout + run.stderr[-3000:]


def files_with(*words: str) -> set[str]:
    return {
        name
        for name, path in MODULES.items()
        if any(word in path.read_text() for word in words)
        and name.partition(".")[0] not in ("demo", "bench", "cli")
    }


def test_one_file_asks_about_devices_and_one_about_compilers() -> None:
    assert files_with(".device.type", "device.type ", ".is_cuda", ".is_cpu ", '"cuda"') == {
        "backend"
    }
    assert files_with("torch.compiler.is_compiling", "_functorch") == {"engine.modes"}


def test_only_the_engine_and_graphs_of_it_have_functions_of_their_own() -> None:
    functions = files_with("autograd.Function")
    assert functions == {"engine.dispatch", "engine.traced", "engine.zeros", "recorded"}


def test_calls_of_modules_are_typed() -> None:
    """What a type checker makes of it is in `typing_of_calls.py`."""
    kinds = [x for x in vars(dt).values() if isinstance(x, type) and issubclass(x, nn.Module)]
    assert len(kinds) > 20
    for kind in kinds:
        owner = next(x for x in kind.__mro__ if "forward" in vars(x))
        assert "        __call__ = forward\n" in inspect.getsource(owner), kind


def test_kernels_and_device_functions_are_narrow() -> None:
    widths = {}
    for name, path in MODULES.items():
        if name.startswith("kernels"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    widths[node.name] = len(node.args.args)
    kernels = {name: n for name, n in widths.items() if name.endswith("_kernel")}
    assert len(kernels) > 8
    assert not {name: n for name, n in kernels.items() if n > 18}
    assert not {name: n for name, n in widths.items() if n > 8 and name not in kernels}


def test_device_code_imports_triton_and_nothing_else() -> None:
    for name, path in MODULES.items():
        if name.startswith("kernels"):
            others = {line.split()[1].partition(".")[0] for line in imports_from_outside(path)}
            assert others <= {"triton", "math"}, name


def imports_from_outside(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [x for x in lines if x.startswith(("import ", "from ")) and not x.startswith("from .")]
