"""What a report says, as text: a table, ratios of two reports, Markdown for the READMEs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .providers import EAGER, TRITON
from .run import FORMAT, PASSES, Row

Report = dict[str, Any]


class ReportError(Exception):
    """A file that is no report of this program."""


def read(path: Path) -> Report:
    """A report written by `detloss bench`.

    Raises:
        ReportError: if there is none, or one of another format.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ReportError(f"{path}: expected a report of `detloss bench`: {reason}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ReportError(f"{path}: expected a report of `detloss bench` in format {FORMAT}")
    return report


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)


def timed(report: Report, kind: str) -> list[Row]:
    return [row for row in report["rows"] if row["kind"] == kind and "ms" in row]


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def table(report: Report) -> str:
    """Every op and criterion by provider and pass; then what was not timed, and why."""
    head = ("", "provider", "pass", "ms", "p10", "p90", "GB/s", "of copy", "MiB", "launches")
    rows: list[Sequence[str]] = [(*head, "host reads")]
    for row in (*timed(report, "op"), *timed(report, "criterion")):
        share = row.get("of_copy_bandwidth")
        rows.append(
            (
                row["name"],
                row["provider"],
                row["pass"],
                *(number(row["ms"][key]) for key in ("median", "p10", "p90")),
                number(row.get("gb_per_s")),
                "-" if share is None else f"{share:.0%}",
                *(number(row.get(key)) for key in ("peak_mib", "launches", "host_reads")),
            )
        )
    absent = sorted({f"{row['provider']}: {row['absent']}" for row in _absent(report)})
    text = aligned(rows)
    # Absent in reports from before they were counted.
    if launches := ", ".join(f"{k} {n}" for k, n in report.get("launches_per_step", {}).items()):
        text += f"\n\nLaunches of a step on a GPU, {TRITON}, counted without one: {launches}"
    return text + ("\n\nNot timed:\n" + "\n".join(f"  {line}" for line in absent) if absent else "")


def _absent(report: Report) -> list[Row]:
    return [row for row in report["rows"] if "absent" in row]


def heading(report: Report) -> str:
    """One line: machine, threads, versions, date, commit, copy bandwidth."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f"{machine['threads']} threads, " if machine["device"] == "cpu" else ""
    quick = "a quick run, smaller than the named sizes; " if report["quick"] else ""
    return (
        f"{quick}{machine['name']}, {threads}copy bandwidth {report['copy_gb_per_s']:.0f} GB/s; "
        f"{versions}; {machine['date']}, commit {machine['commit'] or 'unknown'}"
    )


def _key(row: Row) -> tuple[Any, ...]:
    size = row.get("size", {})
    return (
        row["kind"],
        row["name"],
        row.get("axis"),
        row.get("value"),
        size.get("batch"),
        row["provider"],
        row["pass"],
    )


def comparison(old: Report, new: Report) -> str:
    """Ratios old / new of the medians of what both timed: above 1 the new one is faster."""
    kinds = ("op", "criterion", "sweep")
    before = {_key(row): row for kind in kinds for row in timed(old, kind)}
    rows: list[Sequence[str]] = [("", "provider", "pass", "old ms", "new ms", "old / new", "")]
    both = 0
    for kind in kinds:
        for row in timed(new, kind):
            other = before.pop(_key(row), None)
            if other is None:
                continue
            both += 1
            at = f" ({row['value']} {row['axis']})" if kind == "sweep" else ""
            a, b = other["ms"], row["ms"]
            # Quantiles that overlap tell no difference from noise.
            noise = "" if a["p10"] > b["p90"] or b["p10"] > a["p90"] else "within noise"
            cells = (number(a["median"]), number(b["median"]), f"{a['median'] / b['median']:.2f}")
            rows.append((row["name"] + at, row["provider"], row["pass"], *cells, noise))
    n_new = sum(len(timed(new, kind)) for kind in kinds)
    tail = f"{both} in both, {len(before)} in the old report only, {n_new - both} in the new only"
    return f"{aligned(rows)}\n{tail}"


def providers(rows: Iterable[Row]) -> list[str]:
    """Their names in the order of the report."""
    return list(dict.fromkeys(row["provider"] for row in rows))


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "-"
    text = number(row["ms"]["median"])
    if ours is None or row is ours:
        return text
    return f"{text} ({row['ms']['median'] / ours['ms']['median']:.2g})"


def markdown(report: Report, kind: str, passed: str = PASSES[1]) -> str:
    """A table of medians in ms by provider; in brackets, how many times as long as ours (Triton
    where it ran, else torch) a provider takes. Ops without gradients: their forward pass."""
    rows = timed(report, kind)
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = providers(rows)
    lines = [
        f"| {kind} | size | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        chosen = [row for row in mine if row["pass"] == passed] or mine
        by_provider = {row["provider"]: row for row in chosen}
        ours = by_provider.get(TRITON, by_provider.get(EAGER))
        size = chosen[0]["size"]
        pixels = f", {size['image']} px, {size['classes']} classes" if size["image"] else ""
        only = "" if chosen[0]["pass"] == passed else f", {chosen[0]['pass']}"
        where = f"{size['source']}{pixels}, batch {size['batch']}{only}"
        cells = " | ".join(_cell(by_provider.get(column), ours) for column in columns)
        lines.append(f"| {name} | {where} | {cells} |")
    return "\n".join(lines)


def by_hand(table: dict[str, Any]) -> str:
    """A table of what `detloss bench` does not measure, below how it was measured; a dash for None.

    In a report: `tables`, each with kind, title, how, columns and rows.
    """

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(value: str | float | None) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:g}"

    columns = zip(*table["rows"], strict=True)
    sides = ["---" if all(isinstance(x, str) for x in column) else "---:" for column in columns]
    head = [line(table["columns"]), f"|{'|'.join(sides)}|"]
    body = [line(map(cell, row)) for row in table["rows"]]
    return f"{table['title']}. {table['how']}\n\n" + "\n".join([*head, *body])


NO_GPU = "No GPU figure exists yet: nothing here was measured on one."


def results(reports: Sequence[Report], kinds: Sequence[str] = ("criterion", "op")) -> str:
    """What the READMEs say of the reports: for each its head, its tables, what was not timed."""
    parts = []
    for report in reports:
        ours = EAGER if report["machine"]["device"] == "cpu" else TRITON
        ratios = f"Medians in ms; in brackets, how many times as long as {ours} takes."
        how = report.get("method", ratios)
        parts.append(f"**{report['machine']['name']}**: {heading(report)}. {how}")
        parts += [markdown(report, kind) for kind in kinds if timed(report, kind)]
        parts += [by_hand(table) for table in report.get("tables", ()) if table["kind"] in kinds]
        missing = [row for row in _absent(report) if row["kind"] in kinds]
        absent = sorted({f"- {row['provider']}: {row['absent']}" for row in missing})
        if absent:
            parts.append("Not timed:\n\n" + "\n".join(absent))
    if all(report["machine"]["device"] == "cpu" for report in reports):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


_MARKS = "<!-- {0}: written by bench/readme.py -->", "<!-- end of {0} -->"


def placed(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of that name.

    Raises:
        ValueError: if the marks are not there, once.
    """
    start, end = (re.escape(mark.format(name)) for mark in _MARKS)
    text, count = re.subn(
        f"({start}\n).*?({end})", lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected the marks of {name!r} once, found them {count} times")
    return text
