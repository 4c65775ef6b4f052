"""Whole losses of every detector, with batches of raw maps and boxes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor

import detloss_triton as dt
from detloss_triton.anchors import clustered_anchors

NAMES = ("atss", "rtmdet", "ssd", "yolox", "yolov9")
SIZE, CLASSES, BINS = 64, 5, 16
WIDTHS = [[20.0, 45.0], [50.0, 40.0, 90.0]]
HEIGHTS = [[24.0, 40.0], [30.0, 80.0, 70.0]]
STRIDES = {"atss": (8, 16, 32, 64, 128), "ssd": (16, 32)}
Loss = Any


def loss_of(name: str, num_classes: int = CLASSES) -> Loss:
    """The detector's loss with its defaults, and with YOLOX's L1."""
    if name == "ssd":
        anchors = partial(clustered_anchors, strides=(16, 32), widths=WIDTHS, heights=HEIGHTS)
        return dt.SSDLoss(num_classes, anchors)
    if name == "yolox":
        return dt.YOLOXLoss(num_classes, use_l1=True)
    kinds = {"atss": dt.ATSSLoss, "rtmdet": dt.RTMDetLoss, "yolov9": dt.YOLOv9Loss}
    return kinds[name](num_classes)


def boxes_of(n: int, generator: torch.Generator, size: int = SIZE) -> dict[str, Tensor]:
    centre = size * (0.1 + 0.8 * torch.rand(n, 2, generator=generator))
    half = 3 + 0.2 * size * torch.rand(n, 2, generator=generator)
    boxes = torch.cat([centre - half, centre + half], 1).clamp(0, size)
    return {"boxes": boxes, "labels": torch.randint(CLASSES, (n,), generator=generator)}


def batch(name: str, counts: tuple[int, ...] = (2, 0, 3), seed: int = 0, size: int = SIZE) -> Case:
    """So many boxes in each image; maps are leaves, targets packed."""
    generator = torch.Generator().manual_seed(seed)
    loss = loss_of(name)

    def maps(*features: int, scale: float = 1.0) -> list[Tensor]:
        sides = [-(-size // stride) for stride in STRIDES.get(name, (8, 16, 32))]
        if len(features) < len(sides):
            features = features * len(sides)
        shapes = [(len(counts), n, side, side) for n, side in zip(features, sides, strict=False)]
        made = [scale * torch.randn(shape, generator=generator) for shape in shapes]
        return [x.requires_grad_() for x in made]

    targets = loss.prepare([boxes_of(n, generator, size) for n in counts])
    inputs: dict[str, Any] = {}
    if name == "yolov9":
        classes, distributions, distances = maps(CLASSES), maps(4 * BINS), maps(4)
        levels = zip(classes, distributions, distances, strict=True)
        inputs["main_preds"] = [
            (
                c,
                d.detach().unflatten(1, (BINS, 4)).requires_grad_(),
                b.detach().abs().mul(2).requires_grad_(),
            )
            for c, d, b in levels
        ]
    elif name == "ssd":
        inputs["cls_score"] = maps(*(len(w) * (CLASSES + 1) for w in WIDTHS))
        inputs["bbox_pred"] = maps(*(len(w) * 4 for w in WIDTHS))
    else:
        inputs["cls_score"] = maps(CLASSES)
        inputs["bbox_pred"] = maps(4, scale=0.5)
        if name == "rtmdet":
            inputs["bbox_pred"] = [
                (x.detach().exp() * stride).requires_grad_()
                for x, stride in zip(inputs["bbox_pred"], (8, 16, 32), strict=True)
            ]
        third = {"atss": "centerness", "yolox": "objectness"}
        if name in third:
            inputs[third[name]] = maps(1)
    return Case(loss, {**inputs, "targets": targets})
