"""The pictures of a report: time by provider, bandwidth against the roof, how cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .providers import COMPILED, EAGER, TRITON
from .report import Report, providers, timed
from .run import PASSES

BAR = 0.8
# A provider has one colour in all pictures.
COLOURS = {
    EAGER: "C0",
    COMPILED: "C1",
    TRITON: "C2",
    "transformers": "C3",
    "torch.nn.functional": "C4",
    "torchvision": "C5",
    "scipy": "C6",
    "torch-linear-assignment": "C7",
    "OTX": "C8",
}


def draw(report: Report, directory: Path) -> list[Path]:
    """Write the pictures that the report has figures for; return their paths."""
    pictures = {
        "criteria.png": _criteria,
        "roofline.png": _roofline,
        "growth.png": _growth,
    }
    written = []
    for name, picture in pictures.items():
        figure = picture(report)
        if figure is not None:
            figure.savefig(directory / name, dpi=110)
            written.append(directory / name)
    return written


def _bars(axes: Axes, values: dict[str, dict[str, float]]) -> None:
    """Grouped bars: {name: {provider: value}}, on a logarithmic axis."""
    width = BAR / max(map(len, values.values()))
    for at, by_provider in enumerate(values.values()):
        for i, (provider, value) in enumerate(by_provider.items()):
            x = at + (i - (len(by_provider) - 1) / 2) * width
            axes.bar(x, value, width, label=provider, color=COLOURS.get(provider))
    axes.set_xticks(range(len(values)), list(values), rotation=30, ha="right")
    axes.set_axisbelow(True)
    _logarithmic(axes)
    _legend(axes.figure, axes)


def _logarithmic(axes: Axes) -> None:
    """Ticks at 1, 2 and 5, as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.3)


def _legend(figure: Any, *panels: Axes) -> None:
    """One legend beside all panels, with each label once."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")


def _title(report: Report) -> str:
    machine = report["machine"]
    return f"{machine['name']}, torch {machine['versions']['torch']}, {machine['date']}"


def _criteria(report: Report) -> Figure | None:
    rows = timed(report, "criterion")
    rows = [row for row in rows if row["pass"] == PASSES[1] or row["name"] == "matcher"]
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {row["name"]: {} for row in rows}
    for row in rows:
        values[row["name"]][row["provider"]] = row["ms"]["median"]
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, values)
    axes.set_ylabel("ms, forward + backward")
    axes.set_title(f"Time of a criterion: {_title(report)}", fontsize="medium")
    return figure


def _roofline(report: Report) -> Figure | None:
    rows = [row for row in timed(report, "op") if row["pass"] == PASSES[1]]
    if not rows:
        return None
    values: dict[str, dict[str, float]] = {row["name"]: {} for row in rows}
    for row in rows:
        values[row["name"]][row["provider"]] = row["gb_per_s"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, values)
    roof = report["copy_gb_per_s"]
    axes.axhline(roof, color="black", linestyle="--", linewidth=1)
    axes.annotate("a copy", (1, roof), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_ylabel("GB/s of counted bytes, forward + backward")
    axes.set_title(f"Bandwidth of an op: {_title(report)}", fontsize="medium")
    return figure


def _growth(report: Report) -> Figure | None:
    rows = timed(report, "sweep")
    if not rows:
        return None
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    everything = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = np.ravel(figure.subplots(2, 2))
    for panel, axis in zip(panels, axes_names, strict=False):
        here = [row for row in rows if row["axis"] == axis]
        for name in dict.fromkeys(row["name"] for row in here):
            mine = [row for row in here if row["name"] == name]
            for provider, style in zip(providers(mine), ("-", "--", ":", "-."), strict=False):
                points = [row for row in mine if row["provider"] == provider]
                panel.plot(
                    [row["value"] for row in points],
                    [row["ms"]["median"] for row in points],
                    color=f"C{everything.index(name)}",
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    label=f"{name}, {provider}",
                )
        panel.set_xscale("log")
        _logarithmic(panel)
        ticks = sorted({row["value"] for row in here})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(_AXES[axis])
        panel.set_ylabel("ms, forward + backward")
    for panel in panels[len(axes_names) :]:
        panel.set_visible(False)
    _legend(figure, *panels)
    figure.suptitle(f"How cost grows: {_title(report)}", fontsize="medium")
    return figure


_AXES = {
    "boxes": "boxes per image, at most",
    "batch": "images",
    "classes": "classes",
    "layers": "decoder layers besides the last",
}
