"""Random batches for the five dense criteria: criterion, arguments of its forward, leaves.

Everything is drawn from one seeded generator on the CPU and then moved, so that devices agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trees import leaves, mapped

import detloss_triton as dt

STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Batch:
    """One call of a criterion.

    `differentiable` names the arguments whose tensors require gradients; `of_positives` is a
    pattern of the dotted paths of those that only positives teach.
    """

    make: Callable[..., nn.Module]
    inputs: dict[str, Any]
    differentiable: tuple[str, ...]
    of_positives: str

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Fresh leaves on the device, in `dtype`; what is no leaf stays in its own."""

        def placed(path: str, x: Tensor) -> Tensor:
            if path.split(".")[0] not in self.differentiable:
                return x.to(device, copy=True)
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        return dataclasses.replace(self, inputs=mapped(placed, self.inputs))

    def leaves(self) -> dict[str, Tensor]:
        """Dotted path -> leaf."""
        return {path: x for path, x in leaves(self.inputs) if x.requires_grad}


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def chosen(self, share: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < share

    def labels(self, positive: Tensor, n_classes: int) -> Tensor:
        """A class where positive, `n_classes` elsewhere."""
        return torch.where(positive, self.integers(0, n_classes, *positive.shape), n_classes)

    def boxes(self, size: float, *shape: int) -> Tensor:
        """Boxes xyxy within [0, size], with sides of a tenth to half of it."""
        sides = size * (0.1 + 0.4 * self.uniform(*shape, 2))
        low = (size - sides) * self.uniform(*shape, 2)
        return torch.cat([low, low + sides], -1)


def grid(size: int, stride: int) -> Tensor:
    """(n, 2) centres of a level's cells."""
    line = torch.arange(size // stride) * stride + stride / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def coder() -> dt.DeltaXYWHBBoxCoder:
    return dt.DeltaXYWHBBoxCoder(target_stds=(0.1, 0.1, 0.2, 0.2))


def atss(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, size: int = 64
) -> Batch:
    draw = Draw(seed)
    inputs: dict[str, Any] = {
        name: []
        for name in (
            *("anchors", "cls_score", "bbox_pred", "centerness", "labels", "label_weights"),
            *("bbox_targets", "valid_label_mask"),
        )
    }
    n_positive = 0
    for stride in STRIDES:
        side = size // stride
        n = side * side
        centres = grid(size, stride).expand(images, n, 2)
        positive = draw.chosen(positives, images, n)
        n_positive += int(positive.sum())
        inputs["anchors"].append(torch.cat([centres - 4 * stride, centres + 4 * stride], -1))
        inputs["cls_score"].append(draw.normal(images, classes, side, side) * 2 - 2)
        inputs["bbox_pred"].append(draw.normal(images, 4, side, side))
        inputs["centerness"].append(draw.normal(images, 1, side, side))
        inputs["labels"].append(draw.labels(positive, classes))
        inputs["label_weights"].append(draw.chosen(0.9, images, n).float())
        reach = stride * (1 + 4 * draw.uniform(images, n, 4))
        inputs["bbox_targets"].append(
            torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)
        )
        inputs["valid_label_mask"].append(draw.chosen(0.9, images, n, classes).float())
    inputs["avg_factor"] = float(max(n_positive, 1))

    def make(**kwargs: Any) -> nn.Module:
        slots = {
            "bbox_coder": coder(),
            "loss_cls": dt.CrossSigmoidFocalLoss(),
            "loss_bbox": dt.GIoULoss(loss_weight=2.0),
        }
        return dt.ATSSCriterion(classes, **{**slots, **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred", "centerness"), "bbox_pred|centerness")


def rtmdet(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, size: int = 64
) -> Batch:
    draw = Draw(seed)
    names = ("cls_score", "bbox_pred", "labels", "label_weights", "bbox_targets", "assign_metrics")
    inputs: dict[str, Any] = {name: [] for name in names}
    for stride in STRIDES:
        side = size // stride
        n = side * side
        positive = draw.chosen(positives, images, n)
        targets = draw.boxes(size, images, n)
        inputs["cls_score"].append(draw.normal(images, classes, side, side) * 2 - 2)
        inputs["bbox_pred"].append(targets + 3 * draw.normal(images, n, 4))
        inputs["labels"].append(draw.labels(positive, classes))
        inputs["label_weights"].append(draw.chosen(0.9, images, n).float())
        inputs["bbox_targets"].append(targets * positive.unsqueeze(-1))
        inputs["assign_metrics"].append(draw.uniform(images, n) * positive)
    inputs["stride"] = [(stride, stride) for stride in STRIDES]

    def make(**kwargs: Any) -> nn.Module:
        slots = {"loss_cls": dt.QualityFocalLoss(), "loss_bbox": dt.GIoULoss(loss_weight=2.0)}
        return dt.RTMDetCriterion(classes, **{**slots, **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred"), "bbox_pred")


def ssd(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, anchors: int = 150
) -> Batch:
    draw = Draw(seed)
    positive = draw.chosen(positives, images, anchors)
    inputs = {
        "cls_score": draw.normal(images, anchors, classes + 1),
        "bbox_pred": draw.normal(images, anchors, 4),
        "anchor": draw.boxes(300.0, images, anchors),
        "labels": draw.labels(positive, classes),
        "label_weights": draw.chosen(0.9, images, anchors).float(),
        "bbox_targets": draw.normal(images, anchors, 4),
        "bbox_weights": positive.unsqueeze(-1).expand(-1, -1, 4).float(),
        "avg_factor": int(positive.sum()),
    }

    def make(**kwargs: Any) -> nn.Module:
        return dt.SSDCriterion(classes, **{"bbox_coder": coder(), **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred"), "bbox_pred")


def yolox(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, anchors: int = 150
) -> Batch:
    draw = Draw(seed)
    positive = draw.chosen(positives, images * anchors)
    n_positive = int(positive.sum())
    boxes = draw.boxes(640.0, images, anchors)
    one_hot = torch.eye(classes)[draw.integers(0, classes, n_positive)]
    inputs = {
        "flatten_objectness": draw.normal(images, anchors),
        "flatten_cls_preds": draw.normal(images, anchors, classes),
        "flatten_bbox_preds": draw.normal(images, anchors, 4),
        "flatten_bboxes": boxes,
        "obj_targets": positive.float().unsqueeze(-1),
        "cls_targets": one_hot * draw.uniform(n_positive, 1),
        "bbox_targets": boxes.flatten(0, 1)[positive] + 5 * draw.normal(n_positive, 4),
        "l1_targets": draw.normal(n_positive, 4),
        "num_total_samples": torch.tensor(float(max(n_positive, 1))),
        "num_pos": torch.tensor(n_positive),
        "pos_masks": positive,
    }

    def make(**kwargs: Any) -> nn.Module:
        return dt.YOLOXCriterion(classes, **{"use_l1": True, **kwargs})

    names = ("objectness", "cls_preds", "bbox_preds", "bboxes")
    return Batch(make, inputs, tuple(f"flatten_{name}" for name in names), "flatten_(cls|bbox)")


def yolov9(
    seed: int = 0,
    images: int = 2,
    classes: int = 5,
    positives: float = 0.5,
    size: int = 64,
    targets: int = 4,
) -> Batch:
    """With `positives` 0 all targets are padding."""
    draw = Draw(seed)

    def head() -> list[tuple[Tensor, Tensor, Tensor]]:
        sides = [size // stride for stride in STRIDES]
        return [
            (
                draw.normal(images, classes, side, side) - 2,
                draw.normal(images, 16, 4, side, side),
                0.5 + 3 * draw.uniform(images, 4, side, side),
            )
            for side in sides
        ]

    rows = torch.cat(
        [
            draw.integers(0, classes, images, targets, 1).float(),
            draw.boxes(size, images, targets),
        ],
        -1,
    )
    padding = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])
    used = torch.arange(targets) < max(1, targets // 2) if positives else torch.zeros(targets)
    used = used.bool().expand(images, targets).clone()
    used[:1] |= positives > 0
    inputs = {
        "main_preds": head(),
        "targets": torch.where(used.unsqueeze(-1), rows, padding),
        "aux_preds": head(),
    }

    def make(device: torch.device | str = "cpu", **kwargs: Any) -> nn.Module:
        vec2box = dt.Vec2Box(None, (size, size), list(STRIDES), device)
        return dt.YOLOv9Criterion(classes, vec2box, **kwargs)

    return Batch(make, inputs, ("main_preds", "aux_preds"), r"preds\.\d\.[12]$")


BUILDERS: dict[str, Callable[..., Batch]] = {
    "atss": atss,
    "rtmdet": rtmdet,
    "ssd": ssd,
    "yolox": yolox,
    "yolov9": yolov9,
}
