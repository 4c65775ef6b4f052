"""What is timed: every op and criterion at the sizes that detectors train at, and how they grow.

An op without a size of its own here is timed on its first sample at `ROWS` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detloss_triton import ops  # noqa: F401  (fills the registry)
from detloss_triton.boxes import ltrb
from detloss_triton.engine import REGISTRY, RowOp, Sample
from detloss_triton.vec2box import Vec2Box

from .batches import BUILDERS, STRIDES, Batch, Draw

# The size of an op nobody has named one for: 16 images of 8,400 anchors.
ROWS = 134_400
QUICK_BATCH = 1


@dataclass(frozen=True)
class Size:
    """Where a size comes from: the model that trains at it, its images and its batch."""

    source: str
    image: int
    classes: int
    batch: int

    def __str__(self) -> str:
        return f"{self.source}, {self.image} px, {self.classes} classes, batch {self.batch}"


@dataclass(frozen=True)
class OpCase:
    """An op at a named size; `sample` draws its arguments for a batch of that many images."""

    name: str
    op: Any
    size: Size
    sample: Callable[[Draw, int], Sample]

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Which of the inputs take gradients: of a loss of rows the first one that can, as in a
        criterion."""
        flags: tuple[bool, ...] = self.op.differentiable
        if isinstance(self.op, RowOp) and True in flags:
            return tuple(i == flags.index(True) for i in range(len(flags)))
        return flags


@dataclass(frozen=True)
class CriterionCase:
    """A criterion at a named size: `builder` of `batches`, and its arguments.

    `matcher` times its matching of the last layer alone.
    """

    name: str
    builder: str
    size: Size
    arguments: dict[str, Any] = field(default_factory=dict)
    matcher: bool = False

    def batch(self, **changes: Any) -> Batch:
        settings = {"images": self.size.batch, "classes": self.size.classes}
        return BUILDERS[self.builder](**{**settings, **self.arguments, **changes})


_DECODER = {"queries": 300, "layers": 5, "groups": 5, "boxes": 20}
_DETR = Size("RT-DETR R50", 640, 80, 16)
_DFINE = Size("D-FINE L", 640, 80, 16)
_ATSS = Size("ATSS R50", 640, 80, 8)
_RTMDET = Size("RTMDet L", 640, 80, 16)
_SSD = Size("SSD300 VGG16", 300, 80, 16)
_YOLOX = Size("YOLOX L", 640, 80, 16)
_YOLOV9 = Size("YOLOv9 C", 640, 80, 16)
_LINEAR = Size("torch-linear-assignment's published sizes", 0, 0, 208)

CRITERIA = {
    case.name: case
    for case in (
        CriterionCase(
            "atss",
            "atss",
            _ATSS,
            {"size": 640, "positives": 0.003, "strides": (8, 16, 32, 64, 128)},
        ),
        CriterionCase("rtmdet", "rtmdet", _RTMDET, {"size": 640, "positives": 0.01}),
        CriterionCase("ssd", "ssd", _SSD, {"anchors": 8732, "positives": 0.005}),
        CriterionCase("yolox", "yolox", _YOLOX, {"anchors": 8400, "positives": 0.01}),
        CriterionCase("yolov9", "yolov9", _YOLOV9, {"size": 640, "targets": 20}),
        CriterionCase("detr", "detr", _DETR, _DECODER),
        CriterionCase("dfine", "dfine", _DFINE, _DECODER),
        # What the peer computes as well: it knows neither the layer before the decoder nor a
        # balance shared with denoising layers.
        CriterionCase(
            "dfine, no denoising", "dfine", _DFINE, _DECODER | {"extras": ("aux", "enc")}
        ),
        CriterionCase("matcher", "detr", _DETR, _DECODER | {"extras": ()}, matcher=True),
    )
}


@dataclass(frozen=True)
class Sweep:
    """How cost grows with one thing: its values, and the argument of each builder that sets it."""

    axis: str
    values: tuple[int, ...]
    argument: dict[str, str]
    batch: int = 4


SWEEPS = (
    Sweep("boxes", (5, 20, 80, 160), {"yolov9": "targets", "detr": "boxes", "dfine": "boxes"}),
    Sweep("batch", (1, 4, 16), dict.fromkeys(BUILDERS, "images")),
    Sweep("classes", (20, 80, 365), dict.fromkeys(BUILDERS, "classes")),
    Sweep("layers", (1, 3, 6), {"detr": "layers", "dfine": "layers"}),
)


def _labels(draw: Draw, positives: float, classes: int, *shape: int) -> Tensor:
    return draw.labels(draw.chosen(positives, *shape), classes)


def _classified(
    params: dict[str, Any], anchors: int, classes: int, positives: float, scored: bool
) -> Callable[[Draw, int], Sample]:
    """Logits of all anchors, of which a share has a class, with a score if `scored`."""

    def sample(draw: Draw, batch: int) -> Sample:
        rows = batch * anchors
        logits = draw.normal(rows, classes) * 2 - 3
        label = _labels(draw, positives, classes, rows)
        return Sample((logits, label, draw.uniform(rows) if scored else None, None), params)

    return sample


def _binned(rows: int, bins: int, two: bool) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        n = batch * rows
        logits, left = draw.normal(n, bins), draw.integers(0, bins - two, n)
        right = draw.uniform(n) if two else None
        return Sample((logits, left, None if right is None else 1 - right, right), {})

    return sample


def _distilled(rows: int, bins: int) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        n = batch * rows
        student, teacher = draw.normal(n, bins), draw.normal(n, bins)
        return Sample((student, teacher), {"temperature": 5.0}, draw.uniform(n))

    return sample


def _box_pairs(rows: int, params: dict[str, Any]) -> Callable[[Draw, int], Sample]:
    """Boxes in pixels and their targets, near enough to overlap."""

    def sample(draw: Draw, batch: int) -> Sample:
        target = draw.boxes(640.0, batch * rows)
        shift = 0.1 * (target[:, 2:] - target[:, :2]).repeat(1, 2)
        return Sample((target + shift * (draw.uniform(batch * rows, 4) - 0.5), target), params)

    return sample


def _coordinates(rows: int, params: dict[str, Any]) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        return Sample((draw.normal(batch * rows, 4), draw.normal(batch * rows, 4)), params)

    return sample


def _deltas(anchors: int) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        rows = batch * anchors
        params = {"means": (0.0,) * 4, "stds": (0.1, 0.1, 0.2, 0.2), "limit": 4.135}
        boxes = draw.boxes(640.0, rows)
        return Sample((draw.normal(rows, 4), boxes), params | {"max_shift": 0.0})

    return sample


def _distances(anchors: int) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        rows = batch * anchors
        return Sample((draw.uniform(rows, 4) * 64, draw.uniform(rows, 2) * 640))

    return sample


def _aligned(rules: str, targets: int = 20, classes: int = 80) -> Callable[[Draw, int], Sample]:
    """Two heads, each anchor's box near one that it may lie in."""

    def sample(draw: Draw, batch: int) -> Sample:
        vec2box = Vec2Box(None, (640, 640), list(STRIDES))
        centres, strides = vec2box.anchor_grid, vec2box.scaler
        sizes = [h * w for h, w in vec2box.map_sizes]
        boxes = draw.boxes(640.0, batch, targets)
        label = draw.integers(0, classes, batch, targets, 1).to(boxes.dtype)
        logits, sides = [], []
        for _ in range(2):
            which = draw.integers(0, targets, batch, len(centres), 1).expand(-1, -1, 4)
            near = boxes.gather(1, which) + 8 * draw.normal(batch, len(centres), 4)
            distances = ltrb(centres, near) / strides[:, None]
            logits += (draw.normal(batch, classes, len(centres)) - 2).split(sizes, 2)
            sides += distances.transpose(1, 2).contiguous().split(sizes, 2)
        params = {"iou": "ciou", "iou_power": 6.0, "class_power": 0.5, "topk": 10, "heads": 2}
        params |= {"rules": rules, "reach": 14.99}
        given = tuple(x.contiguous() for x in logits), tuple(x.contiguous() for x in sides)
        of_rules = (strides,) if rules == "yolo" else ()
        rows = torch.cat([label, boxes], -1)
        return Sample((*given, centres, (centres, strides), of_rules, rows), params)

    return sample


def _dense(
    cells: tuple[int, ...], positives: float, centred: bool
) -> Callable[[Draw, int], Sample]:
    """Levels of maps (N, C, H, W): RTMDet's terms, or ATSS's with centerness."""

    def level(draw: Draw, batch: int, n: int) -> tuple[Tensor, ...]:
        def of_map(features: int) -> Tensor:
            return draw.normal(batch, features, n).transpose(1, 2)

        targets = draw.boxes(640.0, batch, n)
        labels = _labels(draw, positives, 80, batch, n)
        quality, weights = draw.uniform(batch, n), torch.ones(batch, n)
        mask = torch.ones(batch, n, 1).expand(-1, -1, 80)
        anchors = targets + 8 * draw.normal(batch, n, 4)
        boxes = of_map(4) if centred else anchors + of_map(4)
        rows = of_map(80), labels, quality, weights, mask, boxes, anchors, targets
        return *rows, of_map(1).squeeze(-1)

    def sample(draw: Draw, batch: int) -> Sample:
        inputs = list(zip(*(level(draw, batch, n) for n in cells), strict=True))
        for i in (2,) if centred else (4, 6, 8):
            inputs[i] = ()
        common = {"number": 100.0, "boxes": "giou_loss", "box_constants": (1e-6,)}
        common |= {"by_iou": False, "background": -1.0}
        if not centred:
            terms = {"classes": "quality_focal", "class_constants": (2.0,), "decode": ""}
            rest = {"decode_constants": (), "factors": (1.0, 2.0), "added": (0.0, 0.0)}
            return Sample((*inputs, ()), common | terms | rest)
        decode = (0.0,) * 4 + (0.1, 0.1, 0.2, 0.2, 4.135, 0.0)
        terms = {"classes": "sigmoid_focal", "class_constants": (0.25, 2.0), "decode": "deltas"}
        rest = {"decode_constants": decode, "factors": (1.0, 2.0, 1.0), "added": (0.0,) * 3}
        return Sample((*inputs, ()), common | terms | rest)

    return sample


def _costs(draw: Draw, batch: int, layers: int = 6, queries: int = 300, boxes: int = 20) -> Sample:
    def normalised(*shape: int) -> Tensor:
        return torch.cat([draw.uniform(*shape, 2), 0.05 + 0.3 * draw.uniform(*shape, 2)], -1)

    params = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0, "alpha": 0.25, "gamma": 2.0}
    params |= {"softmax": False, "iou_power": -1.0}
    logits = (draw.normal(layers, batch, queries, 80) - 2).unbind()
    labels, predicted = draw.integers(0, 80, batch, boxes), normalised(layers, batch, queries)
    return Sample((logits, predicted.unbind(), labels, normalised(batch, boxes)), params)


def _assigned(rows: int, columns: int, layers: int = 1) -> Callable[[Draw, int], Sample]:
    def sample(draw: Draw, batch: int) -> Sample:
        n = layers * batch
        counts = torch.tensor([[rows] * n, [columns] * n])
        return Sample((draw.uniform(n, rows, columns), counts[0], counts[1]))

    return sample


def _masked(draw: Draw, batch: int) -> Sample:
    mask = draw.uniform(batch * 8400) < 0.01
    return Sample((mask,), {"n": int(mask.sum())})


def _mined(draw: Draw, batch: int) -> Sample:
    return Sample((draw.uniform(batch, 8732), draw.integers(0, 500, batch, 1)))


# (op, what tells several sizes of an op apart, size, sample)
_OPS: tuple[tuple[str, str, Size, Callable[[Draw, int], Sample]], ...] = (
    ("binary_cross_entropy", "", _YOLOV9, _classified({}, 8400, 80, 0.02, True)),
    (
        "sigmoid_focal",
        "",
        _ATSS,
        _classified({"alpha": 0.25, "gamma": 2.0}, 8525, 80, 0.003, False),
    ),
    ("quality_focal", "", _RTMDET, _classified({"beta": 2.0}, 8400, 80, 0.01, True)),
    (
        "varifocal",
        "",
        _DETR,
        _classified({"alpha": 0.75, "gamma": 2.0}, 6 * 300, 80, 0.04, True),
    ),
    ("two_bin", "classes", _SSD, _binned(8732, 81, False)),
    ("two_bin", "DFL", _YOLOV9, _binned(20 * 10 * 4, 16, True)),
    ("two_bin", "FGL", _DFINE, _binned(6 * 300 * 4, 33, True)),
    ("distillation", "", _DFINE, _distilled(5 * 300 * 4, 33)),
    ("l1", "", _DETR, _coordinates(6 * 300, {})),
    ("smooth_l1", "", _SSD, _coordinates(8732, {"beta": 1.0})),
    ("iou_loss", "", _YOLOX, _box_pairs(8400, {"mode": "square", "eps": 1e-16})),
    ("giou_loss", "", _RTMDET, _box_pairs(8400, {"eps": 1e-6})),
    ("diou_loss", "", _YOLOV9, _box_pairs(8400, {"eps": 1e-9})),
    ("ciou_loss", "", _YOLOV9, _box_pairs(8400, {"eps": 1e-9, "alpha_grad": False})),
    ("delta_decode", "", _ATSS, _deltas(8525)),
    ("distance_decode", "", _RTMDET, _distances(8400)),
    ("dense", "as in RTMDet", _RTMDET, _dense((6400, 1600, 400), 0.01, False)),
    ("dense", "as in ATSS", _ATSS, _dense((6400, 1600, 400, 100, 25), 0.003, True)),
    ("first_set", "", _YOLOX, _masked),
    ("hardest", "", _SSD, _mined),
    ("align", "", _YOLOV9, _aligned("otx")),
    ("align", "rules yolo", _YOLOV9, _aligned("yolo")),
    ("match_cost", "", _DETR, _costs),
    ("optimal_assignment", "20 x 300", _DETR, _assigned(20, 300, layers=6)),
    ("optimal_assignment", "300 x 100", _LINEAR, _assigned(300, 100)),
    ("optimal_assignment", "300 x 300", _LINEAR, _assigned(300, 300)),
    ("optimal_assignment", "300 x 600", _LINEAR, _assigned(300, 600)),
)


def _from_samples(op: Any) -> OpCase:
    def sample(draw: Draw, batch: int) -> Sample:
        first: Sample = next(iter(op.samples(ROWS // 16 * batch, draw.generator)))
        return first

    return OpCase(op.name, op, Size("its first sample", 640, 0, 16), sample)


def op_cases() -> list[OpCase]:
    """Every op of the registry, at each of its named sizes."""
    cases = []
    for name, op in sorted(REGISTRY.items()):
        named = [
            OpCase(f"{name}, {which}" if which else name, op, size, sample)
            for owner, which, size, sample in _OPS
            if owner == name
        ]
        cases += named or [_from_samples(op)]
    return cases
