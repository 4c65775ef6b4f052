"""COCO average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .samples import Array, Detections, Sample


@dataclass(frozen=True)
class AveragePrecision:
    """AP is the mean over IoU thresholds 0.50 to 0.95, AP50 the one at 0.50; both in [0, 1]."""

    ap: float
    ap50: float


def average_precision(
    samples: Sequence[Sample], detections: Sequence[Detections], num_classes: int
) -> AveragePrecision:
    """Compare detections with the true boxes; no detection at all scores zero.

    Boxes are compared in the pixels of the model's input: AP over all sizes is free of scale.
    """
    rows = [
        _rows(index, found.boxes, found.labels, found.scores)
        for index, found in enumerate(detections)
    ]
    # pycocotools cannot load an empty result.
    if not any(len(row) for row in rows):
        return AveragePrecision(0.0, 0.0)
    # It also reports every stage on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _truth(samples, num_classes)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50 = evaluation.stats[:2]
    return AveragePrecision(float(ap), float(ap50))


def _rows(index: int, boxes: Array, labels: Array, scores: Array) -> Array:
    """Rows `[image, x, y, width, height, score, class]`, the array form of COCO's results."""
    columns = (
        np.full(len(boxes), index),
        boxes[:, :2],
        boxes[:, 2:] - boxes[:, :2],
        scores,
        labels,
    )
    return np.column_stack(columns).astype(np.float64)


def _truth(samples: Sequence[Sample], num_classes: int) -> dict[str, list[dict[str, object]]]:
    annotations: list[dict[str, object]] = []
    for index, sample in enumerate(samples):
        for (x1, y1, x2, y2), label in zip(
            sample.boxes.tolist(), sample.labels.tolist(), strict=True
        ):
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    # pycocotools takes a matched id of 0 for "unmatched".
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label,
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": index} for index in range(len(samples))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": annotations,
    }
