"""Every example runs as it stands, and learns; so do those in the criteria's docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy

import pytest
from machine import TESTS

import detloss_triton

FOLDER = TESTS.parent / "examples"
# What each needs beside the package. `test_graphed.py` runs the whole step, on a GPU.
NEEDS = {
    "lightning_module": ["lightning"],
    "rtdetr_loop": [],
    "torchvision_targets": [],
    "transformers_trainer": ["transformers", "accelerate"],
}
NOT_RUN_HERE = {"squares", "whole_step"}
CRITERIA = [name for name in detloss_triton.__all__ if name.endswith("Criterion")]


def test_none_is_forgotten() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == NEEDS.keys() | NOT_RUN_HERE
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(examples/(\w+)\.py\)", readme))
    assert named == (NEEDS.keys() | NOT_RUN_HERE) - {"squares"}


@pytest.mark.parametrize("name", NEEDS)
def test_it_learns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(FOLDER)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^\w+ \d+: loss (.*)$", said, re.MULTILINE)]
    assert len(losses) >= 4, said
    # What denoising queries are to find again keeps their losses up: a sixth is much there.
    assert losses[-1] < 0.85 * losses[0], said


@pytest.mark.parametrize("name", CRITERIA)
def test_the_docstring_of_a_criterion(name: str) -> None:
    kind = getattr(detloss_triton, name)
    module = importlib.import_module(kind.__module__)
    (example,) = doctest.DocTestFinder(recurse=False).find(kind, name, module, globs={})
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried > 2 and not failed, "".join(said)
