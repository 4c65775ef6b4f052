"""The pages of the documentation name everything once; `zensical build --strict` follows links."""

from __future__ import annotations

import re

from machine import TESTS

import detloss_triton

ROOT = TESTS.parent
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
TEXT = "\n".join(PAGES.values())


def test_the_api_is_complete() -> None:
    shown = re.findall(r"^::: detloss_triton\.(\w+)$", TEXT, re.MULTILINE)
    # OTX's name for what `functional` shows.
    assert sorted([*shown, "smooth_l1_loss"]) == sorted(detloss_triton.__all__)


def test_what_the_readme_marks_stands_on_one_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"^<!-- --8<-- \[start:(\w+)\] -->$", readme, re.MULTILINE)
    assert sorted(re.findall(r'"README.md:(\w+)"', TEXT)) == sorted(marked)
    for name in marked:
        part = readme.split(f"[start:{name}]")[1].split(f"[end:{name}]")[0]
        assert "](" not in part, f"{name}: a link leads elsewhere from docs/"


def test_pages_and_pictures_are_there() -> None:
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert sorted(re.findall(r'"(\w+\.md)"', navigation)) == sorted(PAGES)
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert pictures and all((ROOT / "docs" / name).is_file() for name in pictures)
