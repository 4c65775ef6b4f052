"""Write the results into the READMEs: every `bench/results/<device>/bench.json`, between marks.

python bench/readme.py
"""

from __future__ import annotations

from pathlib import Path

from detloss_triton.bench.report import placed, read, results

ROOT = Path(__file__).parents[1]
# What each README shows: all that was measured, or the criteria alone. A run of `detloss bench` has
# the kinds "criterion" and "op"; tables made by hand may be of any kind that stands here.
KINDS = {
    "bench/README.md": ("criterion", "compiled", "peer", "op"),
    "README.md": ("criterion",),
}


def written(root: Path, name: str) -> str:
    """The README of that name as it should be."""
    reports = [read(path) for path in sorted((root / "bench/results").glob("*/bench.json"))]
    text = (root / name).read_text(encoding="utf-8")
    return placed(text, "results", results(reports, KINDS[name]))


def main() -> None:
    for name in KINDS:
        (ROOT / name).write_text(written(ROOT, name), encoding="utf-8")


if __name__ == "__main__":
    main()
