"""Training a small detector and writing down how it went."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from detloss_triton import graphed
from detloss_triton.backend import versions

from . import ranks
from .average_precision import AveragePrecision, average_precision
from .coco_images import CocoImages
from .detectors import RECIPES
from .pictures import plot_losses, plot_predictions
from .samples import Detections, ImageSource, InputError, Sample, stack_images
from .shape_images import ShapeImages

WEIGHT_DECAY = 0.01
LARGEST_GRADIENT_NORM = 10.0
MOST_WARMUP_STEPS = 50
# The last step's learning rate, as a share of the highest.
FINAL_RATE = 0.01
# Reading a loss waits for the device, so the progress bar does it only now and then.
STEPS_PER_READING = 10


@dataclass(frozen=True)
class Settings:
    """What `detloss train` was asked for, defaults filled in; `backend` is the one that runs."""

    criterion: str
    steps: int
    batch_size: int
    image_size: int
    seed: int
    backend: str
    device: torch.device
    threads: int
    output: Path
    graphed: bool = False
    images: Path | None = None
    annotations: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """A detector's answers on the held-out images, and their average precision."""

    detections: list[Detections]
    precision: AveragePrecision


def train(settings: Settings) -> None:
    """Train as told; write `loss.png`, `predictions.png` and `metrics.json` at the end.

    Where `torchrun` started several processes, they share every batch, and the first one writes.

    Raises:
        InputError: if the settings cannot be used; nothing is written then.
    """
    with ranks.group(settings.device) as device:
        _train(replace(settings, device=device))


def _train(settings: Settings) -> None:
    started = time.perf_counter()
    _check_output(settings.output)
    if settings.batch_size < ranks.count():
        raise InputError(
            f"--batch-size: expected at least one image for each of {ranks.count()} processes, "
            f"got {settings.batch_size}"
        )
    recipe = RECIPES[settings.criterion]
    source = _source(settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    # Else a GPU's convolutions may add up in another order on every run.
    torch.backends.cudnn.deterministic = True
    model = recipe.build(len(source.class_names), settings.image_size, settings.device)
    if settings.graphed:
        model.criterion = graphed(model.get_submodule("criterion"))

    before = evaluate(model, source, settings) if ranks.rank() == 0 else None
    training_started = time.perf_counter()
    history = fit(model, source, recipe.learning_rate, settings)
    training_seconds = time.perf_counter() - training_started
    if before is None:
        return
    after = evaluate(model, source, settings)

    metrics = {
        "ap50": {"before": before.precision.ap50, "after": after.precision.ap50},
        "ap": {"before": before.precision.ap, "after": after.precision.ap},
        "losses": {
            "first": {term: values[0] for term, values in history.items()},
            "last": {term: values[-1] for term, values in history.items()},
        },
        "validation_images": len(source.validation),
        "classes": list(source.class_names),
        "processes": ranks.count(),
        "seconds": {
            "training": training_seconds,
            "total": time.perf_counter() - started,
        },
        "settings": asdict(settings),
        "versions": versions(),
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, default=str) + "\n"
    (settings.output / "metrics.json").write_text(text, encoding="utf-8")
    plot_losses(
        history,
        f"{settings.criterion} losses, {settings.steps} steps of {settings.batch_size} images",
        settings.output / "loss.png",
    )
    plot_predictions(
        source.validation,
        after.detections,
        source.class_names,
        f"Held-out images after {settings.steps} steps: AP50 {after.precision.ap50:.2f}",
        settings.output / "predictions.png",
    )
    print(
        f"AP50 {before.precision.ap50:.3f} -> {after.precision.ap50:.3f}, "
        f"AP {before.precision.ap:.3f} -> {after.precision.ap:.3f} "
        f"on {len(source.validation)} held-out images, "
        f"{settings.steps} steps in {training_seconds:.0f} s\n"
        f"wrote loss.png, predictions.png and metrics.json to {settings.output}"
    )


def fit(
    model: nn.Module,
    source: ImageSource,
    learning_rate: float,
    settings: Settings,
) -> dict[str, list[float]]:
    """Train behind a progress bar; return the value of each loss term at every step.

    Of several processes each takes its share of the batches; the values are means over all.
    """
    steps = settings.steps
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    history: list[dict[str, Tensor]] = []
    trained = nn.parallel.DistributedDataParallel(model) if ranks.are_several() else model
    trained.train()
    # A terminal is redrawn often; a log file gets a line now and then.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    quiet = ranks.rank() > 0
    with tqdm(range(steps), "training", unit="step", mininterval=interval, disable=quiet) as bar:
        for step in bar:
            samples = source.batch(settings.batch_size, ranks.share())
            losses = trained(stack_images(samples, settings.device), samples)
            optimizer.zero_grad()
            losses["total_loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            history.append({term: loss.detach() for term, loss in losses.items()})
            if step % STEPS_PER_READING == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{losses['total_loss'].item():.3f}", refresh=False)
    values = ranks.mean(torch.stack([torch.stack([*losses.values()]) for losses in history]))
    return dict(zip(history[0], values.T.tolist(), strict=True))


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a linear rise, then half a cosine down."""
    warmup = min(MOST_WARMUP_STEPS, steps // 8) + 1
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / warmup) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


@torch.no_grad()
def evaluate(model: nn.Module, source: ImageSource, settings: Settings) -> Evaluation:
    """Detect objects in the held-out images and score the detections."""
    model.eval()
    detections: list[Detections] = []
    samples: Sequence[Sample] = source.validation
    for start in range(0, len(samples), settings.batch_size):
        batch = samples[start : start + settings.batch_size]
        detections += model(stack_images(batch, settings.device))
    precision = average_precision(samples, detections, len(source.class_names))
    return Evaluation(detections, precision)


def _source(settings: Settings) -> ImageSource:
    if settings.images is not None and settings.annotations is not None:
        return CocoImages(settings.images, settings.annotations, settings.image_size, settings.seed)
    return ShapeImages(settings.image_size, settings.seed)


def _check_output(output: Path) -> None:
    """Refuse a place that cannot be written to before the work is done, not after."""
    existing = output.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output: expected a directory that can be written to, got {output}")
