"""Write the results into the READMEs: every `bench/results/<device>/bench.json`, between marks.

python bench/readme.py
"""

from __future__ import annotations

from pathlib import Path

from detloss_triton.bench.report import placed, read, results

ROOT = Path(__file__).parents[1]
# What each README shows: all that was measured, or the criteria alone.
KINDS = {"bench/README.md": ("criterion", "op"), "README.md": ("criterion",)}


def written(root: Path, name: str) -> str:
    """The README of that name as it should be."""
    reports = [read(path) for path in sorted((root / "bench/results").glob("*/bench.json"))]
    return placed((root / name).read_text(), "results", results(reports, KINDS[name]))


def main() -> None:
    for name in KINDS:
        (ROOT / name).write_text(written(ROOT, name))


if __name__ == "__main__":
    main()
