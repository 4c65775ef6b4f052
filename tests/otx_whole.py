"""OTX 2.3.0's heads with their assigners and criteria, beside our whole losses of the same maps.

    OTX_ROOT=otx-2.3.0-py3-none-any.whl python tests/otx_whole.py

Run by test_whole.py, as a program of its own, as otx_heads.py is. It prints a line per batch: the
detector, boxes per image, the seed, the classes that nobody looked for, how much the total loss
depends on rounding, and the largest error of ours and of the gradients of the head's parameters.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from otx_heads import (
    CLASSES,
    Detector,
    atss,
    by_criterion,
    error,
    load_from,
    rtmdet,
    ssd,
    step,
    yolox,
)
from torch import Tensor

import detloss_triton as dt
from detloss_triton.anchors import clustered_anchors

COUNTS = ((3, 6), (0, 4), (0, 0), (40, 1))
SEEDS = (1, 2)
# What rounds in float32, relative to a coordinate or a logit; and how often that is tried out.
ROUNDING, TRIALS = 2e-6, 2


def whole(name: str) -> Any:
    """The loss of the detector that otx_heads.py builds."""
    if name == "ssd":
        widths = [[39.0, 92.0, 141.0], [206.0, 386.0, 717.0]]
        heights = [[49.0, 148.0, 324.0], [587.0, 381.0, 323.0]]
        anchors = partial(clustered_anchors, strides=(16, 32), widths=widths, heights=heights)
        return dt.SSDLoss(CLASSES, anchors)
    if name == "yolox":
        return dt.YOLOXLoss(CLASSES, use_l1=True)
    return {"atss": dt.ATSSLoss, "rtmdet": dt.RTMDetLoss}[name](CLASSES)


class Ours:
    """The whole loss as `step` calls it.

    Attributes:
        unclear: by how much of itself the total changes with what is rounded off predictions and
            boxes: where an assignment hangs on that, by far more than they do.
    """

    def __init__(self, name: str, ignored: tuple[int, ...]) -> None:
        self.loss, self.ignored, self.unclear = whole(name), ignored, 0.0

    def __call__(self, detector: Detector, features: Any, entity: Any) -> dict[str, Any]:
        maps = detector.head(features)
        pairs = zip(entity.bboxes, entity.labels, strict=True)
        targets = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]
        mask: dict[str, Tensor] = {}
        if self.ignored:
            mask["valid_label_mask"] = torch.ones(len(targets), CLASSES)
            mask["valid_label_mask"][:, list(self.ignored)] = 0
        generator = torch.Generator().manual_seed(0)

        def total(rounding: float) -> float:
            def near(x: Tensor) -> Tensor:
                x = x.detach().double()
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                return x + rounding * noise * x.abs().clamp(min=1)

            near_maps = [[near(level) for level in each] for each in maps]
            near_targets = [{**target, "boxes": near(target["boxes"])} for target in targets]
            return dt.sum_losses(self.loss(*near_maps, near_targets, **mask)).item()

        exact = total(0)
        self.unclear = max(abs(total(ROUNDING) - exact) for _ in range(TRIALS)) / max(
            abs(exact), 1e-9
        )
        with dt.validation(True):
            losses: dict[str, Any] = self.loss(*maps, targets, **mask)
        return losses


def main() -> None:
    torch.set_num_threads(1)
    otx = load_from(os.environ["OTX_ROOT"])
    for build in (atss, rtmdet, ssd, yolox):
        name = build.__name__
        for counts in COUNTS:
            for seed in SEEDS:
                for ignored in ((), (1, 3)) if name == "atss" else ((),):
                    theirs = step(build, otx, by_criterion(otx), counts, ignored, seed)
                    ours = Ours(name, ignored)
                    found = step(build, otx, ours, counts, ignored, seed)
                    batch = f"{name} {counts} seed {seed} ignored {ignored}"
                    print(f"{batch}: {ours.unclear:.1e} {error(found, theirs):.1e}", flush=True)


if __name__ == "__main__":
    main()
