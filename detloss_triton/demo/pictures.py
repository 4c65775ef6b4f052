"""The pictures that a training run leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from .samples import Array, Detections, Sample

MOST_PICTURES = 12
PICTURES_PER_ROW = 4
# Below this score a detection is left out of the picture; average precision counts it all the same.
LOWEST_SCORE_SHOWN = 0.4
TRUE_COLOUR, PREDICTED_COLOUR = "white", "#00e5ff"
LABEL_BACKGROUND = "#202020"
# The loss axis ends this many times below the smallest term's median.
LARGEST_FALL = 20
# A label takes this share of the picture's height.
LABEL_HEIGHT = 0.06
TERM_NAMES = {
    "loss_cls": "classification (loss_cls)",
    "loss_bbox": "box distance (loss_bbox)",
    "loss_ddf": "distillation (loss_ddf)",
    "loss_df": "box distribution (loss_df)",
    "loss_fgl": "box distribution (loss_fgl)",
    "loss_giou": "box overlap (loss_giou)",
    "loss_iou": "box overlap (loss_iou)",
    "loss_vfl": "classification (loss_vfl)",
    "total_loss": "total (total_loss)",
}


def plot_losses(history: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw one curve per loss term over the steps: faint as computed, strong as a running mean."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for index, (term, values) in enumerate(history.items()):
        colour = "black" if term == "total_loss" else f"C{index}"
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
        axes.plot(
            steps,
            running_mean(values, len(values) // 20),
            color=colour,
            linewidth=2.2,
            marker="o" if len(values) < 10 else None,
            label=TERM_NAMES.get(term, term),
        )
    axes.set_yscale("log")
    # A term that starts at 0, as a distillation does, would stretch the axis over many decades.
    lowest = min(float(np.median(values)) for values in history.values()) / LARGEST_FALL
    if lowest > axes.get_ylim()[0]:
        axes.set_ylim(bottom=lowest)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=14)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("loss (logarithmic)", fontsize=12)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=11)
    figure.savefig(path, dpi=110)


def running_mean(values: Sequence[float], window: int) -> Array:
    """The mean of each value and its neighbours, `window // 2` to either side where they exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(values))
    mean: Array = (sums[end] - sums[first]) / (end - first)
    return mean


def plot_predictions(
    samples: Sequence[Sample],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Draw true and predicted boxes, with their classes, on a grid of the first images."""
    shown = min(len(samples), MOST_PICTURES)
    columns = min(shown, PICTURES_PER_ROW)
    rows = -(-shown // columns)
    figure = Figure(figsize=(3.3 * max(columns, 2.5), 3.3 * rows + 1.0), layout="constrained")
    for index in range(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(samples[index].image, interpolation="bilinear")
        axes.axis("off")
        _draw_boxes(axes, samples[index], detections[index], class_names)
    figure.suptitle(title, fontsize=14)
    figure.legend(
        handles=[
            Line2D([], [], color=TRUE_COLOUR, linestyle="--", label="true box, class below it"),
            Line2D(
                [],
                [],
                color=PREDICTED_COLOUR,
                label="predicted box, class and score above it "
                f"(scores of {LOWEST_SCORE_SHOWN} and more)",
            ),
        ],
        loc="outside lower center",
        ncols=2 if columns > 2 else 1,
        fontsize=12,
        facecolor=LABEL_BACKGROUND,
        labelcolor="white",
    )
    figure.savefig(path, dpi=110)


def _draw_boxes(axes: Axes, sample: Sample, found: Detections, class_names: Sequence[str]) -> None:
    side = len(sample.image)
    shown = found.scores >= LOWEST_SCORE_SHOWN
    rows = zip(found.boxes[shown], found.labels[shown], found.scores[shown], strict=True)
    # The best come first: drawn last, they cover the others.
    for box, label, score in reversed(list(rows)):
        _draw_box(axes, box, PREDICTED_COLOUR, "-")
        text = f"{class_names[label]} {score:.2f}"
        _write(axes, text, box, max(box[1], LABEL_HEIGHT * side), "bottom", PREDICTED_COLOUR)
    for box, label in zip(sample.boxes, sample.labels, strict=True):
        _draw_box(axes, box, TRUE_COLOUR, "--")
        lowest = (1 - LABEL_HEIGHT) * side
        _write(axes, class_names[label], box, min(box[3], lowest), "top", TRUE_COLOUR)


def _draw_box(axes: Axes, box: Array, colour: str, line: str) -> None:
    x1, y1, x2, y2 = map(float, box)
    rectangle = Rectangle(
        (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=line
    )
    rectangle.set_linewidth(1.6)
    axes.add_patch(rectangle)


def _write(axes: Axes, text: str, box: Array, y: float, vertical: str, colour: str) -> None:
    """Write beside the box at height `y`, towards the middle of the picture."""
    right = box[0] + box[2] > sum(axes.get_xlim())
    axes.text(
        float(box[2] if right else box[0]),
        y,
        text,
        color=colour,
        fontsize=7.5,
        horizontalalignment="right" if right else "left",
        verticalalignment=vertical,
        # A class name may hold a dollar sign, which is no formula.
        parse_math=False,
        bbox={"facecolor": LABEL_BACKGROUND, "alpha": 0.65, "pad": 0.8, "linewidth": 0},
    )
