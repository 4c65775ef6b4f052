"""What is built from a checkout, with the setuptools at hand and without a network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import detloss_triton

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "detloss_triton"
FOLDERS = ("bench", "detloss_triton", "docs", "examples", "kernels", "tests")

try:
    SETUPTOOLS = importlib.metadata.version("setuptools")
except importlib.metadata.PackageNotFoundError:
    SETUPTOOLS = "0"


def builds(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as slow, and skip it where the setuptools at hand cannot build."""
    reason = f"needs setuptools 77 or later, found {SETUPTOOLS}"
    cannot = int(SETUPTOOLS.partition(".")[0]) < 77
    return pytest.mark.slow(pytest.mark.skipif(cannot, reason=reason)(test))


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program beside `cwd`'s package, whatever is installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(kind: str, tree: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Build a `wheel` or an `sdist` as a front end does; the last line names the file."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(output)!r}))"
    return python("-c", code, cwd=tree)


def copied(to: Path) -> Path:
    """This tree without what tools leave in it, so that building writes elsewhere."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, to)
    return to


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    tree, output = copied(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("sdist")
    built = build("sdist", tree, output)
    assert built.returncode == 0, built.stderr
    with tarfile.open(output / built.stdout.splitlines()[-1]) as archive:
        archive.extractall(output, filter="data")
    return output / f"detloss_triton-{detloss_triton.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built from the unpacked sdist."""
    output = tmp_path_factory.mktemp("wheel")
    built = build("wheel", unpacked, output)
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(output / built.stdout.splitlines()[-1])


@builds
def test_a_wheel_holds_the_package_and_its_kernels(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    information = f"detloss_triton-{detloss_triton.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"detloss_triton", information}
    ours = {
        f"detloss_triton/{path.relative_to(PACKAGE).as_posix()}"
        for folder in (PACKAGE, PACKAGE / "kernels")
        for path in folder.rglob("*.py")
    }
    assert any("kernels/" in name for name in ours)
    assert ours | {"detloss_triton/py.typed", f"{information}/licenses/LICENSE"} <= names


@builds
def test_what_pypi_shows_leads_nowhere_wrong(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    shown = wheel.read(metadata).decode()
    assert "Description-Content-Type: text/markdown" in shown
    links = re.findall(r"\]\(([^)]*)\)", shown)
    assert all(link.startswith("https://") for link in links), links
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if "](" not in line]
    assert set(kept) <= set(shown.splitlines())
    assert "\nCONTRIBUTING.md says how" in shown


@builds
def test_an_sdist_holds_what_its_tests_need(unpacked: Path) -> None:
    files = ("CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "zensical.toml")
    for name in (*files, "docs/predictions.png", "docs/results/criteria.png"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    for folder in ("tests", "bench", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert not (unpacked / "kernels").exists()

    pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    # All are collected; a file that cannot be is an error.
    chosen = "test_golden and ssd-default or README or readme"
    ran = python(*pytest_, "-k", chosen, cwd=unpacked)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:]
    where = python("-c", "import detloss_triton as d; print(d.__file__)", cwd=unpacked)
    assert Path(where.stdout.strip()).is_relative_to(unpacked)


def plain_text(kernels: Path) -> None:
    kernels.write_text("../kernels")


def nothing(kernels: Path) -> None:
    pass


WITHOUT_SYMLINKS = [plain_text, nothing, Path.mkdir]


@pytest.mark.parametrize("left", WITHOUT_SYMLINKS, ids=["text", "nothing", "folder"])
def test_a_checkout_without_symlinks_says_so(left: Callable[[Path], None], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(PACKAGE, tmp_path / "detloss_triton", ignore=ignored)
    left(tmp_path / "detloss_triton" / "kernels")
    run = python("-c", "import detloss_triton", cwd=tmp_path)
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert "symlink" in last and "git config core.symlinks true" in last
    assert "Triton" not in last


@builds
@pytest.mark.parametrize("left", WITHOUT_SYMLINKS, ids=["text", "nothing", "folder"])
@pytest.mark.parametrize("kind", ["sdist", "wheel", "editable"])
def test_nothing_is_built_without_kernels(
    kind: str, left: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "tree").mkdir()
    tree = copied(tmp_path / "tree")
    kernels = tree / "detloss_triton" / "kernels"
    shutil.rmtree(kernels) if not kernels.is_symlink() else kernels.unlink()
    left(kernels)
    built = build(kind, tree, tmp_path / "out")
    assert built.returncode != 0
    assert "git config core.symlinks true" in built.stderr
    assert not list((tmp_path / "out").iterdir())
