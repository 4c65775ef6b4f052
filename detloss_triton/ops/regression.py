"""Losses between boxes (xyxy) and between coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.boxes import Columns, area, columns, hull, overlap
from detloss_triton.engine import TILE, Input, Sample, Tile, power_of_2, row_loss

# The least union of a plain IoU; the least IoU is a loss's own `eps`.
UNION_EPS = 1e-6
# The least union and hull of a GIoU, in criteria and in matching.
GIOU_EPS = 1e-6
# Added to the denominators of YOLOv9's IoU, by whose rules: see `BoxMatcher`.
YOLOV9_EPS = {"otx": 1e-9, "yolo": 1e-7}

Rules = Literal["otx", "yolo"]

IOU_MODES = ("log", "square", "linear")


def check_iou_mode(mode: str) -> None:
    if mode not in IOU_MODES:
        raise ValueError(f"mode must be one of {', '.join(IOU_MODES)}, got {mode!r}")


def check_rules(place: str, rules: str) -> None:
    if rules not in YOLOV9_EPS:
        raise ValueError(f"{place}: rules must be 'otx' or 'yolo', got {rules!r}")


_INPUTS = (Input("pred", features=1, grad=True), Input("target", features=1, grad=True))


def _box_samples(*params: dict[str, Any]) -> Callable[..., Iterator[Sample]]:
    """Boxes that overlap, are equal, share edges, lie apart, have no width or a negative one."""

    def samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
        def boxes() -> Tensor:
            low = torch.rand(rows, 2, generator=generator) * 2
            return torch.cat([low, low + 0.2 + torch.rand(rows, 2, generator=generator)], -1)

        for p in params:
            pred, target = boxes(), boxes()
            n = rows // 8
            pred[:n] = target[:n]
            pred[n : 2 * n, 0::2] = target[n : 2 * n, 2:3] + torch.tensor([0.0, 0.5])
            pred[2 * n : 3 * n] += 10.0
            pred[3 * n : 4 * n, 2] = pred[3 * n : 4 * n, 0]
            pred[4 * n : 5 * n, 2] = pred[4 * n : 5 * n, 0] - 0.1
            weight = (torch.rand(rows, generator=generator) * 2).round()
            yield Sample((pred, target), p, weight)
            yield Sample((pred, target), p)

    return samples


def _coordinate_samples(*params: dict[str, Any]) -> Callable[..., Iterator[Sample]]:
    def samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
        for p in params:
            for features in (4, 1, 5):
                pred = torch.randn(rows, features, generator=generator) * 2
                target = torch.randn(rows, features, generator=generator)
                pred[: rows // 4] = target[: rows // 4]
                weight = (torch.rand(rows, generator=generator) * 2).round()
                yield Sample((pred, target), p, weight)

    return samples


def iou_and_union(p: Columns, t: Columns, eps: float) -> tuple[Tensor, Tensor]:
    """(IoU, union), the union at least eps."""
    inter = overlap(p, t)
    union = (area(p) + area(t) - inter).clamp(min=eps)
    return inter / union, union


def giou(p: Columns, t: Columns, eps: float) -> Tensor:
    """Generalised IoU of broadcastable columns; union and hull at least eps."""
    iou, union = iou_and_union(p, t, eps)
    width, height = hull(p, t)
    enclosing = (width.clamp(min=0) * height.clamp(min=0)).clamp(min=eps)
    return iou - (enclosing - union) / enclosing


def centre_term(p: Columns, t: Columns, eps: float) -> Tensor:
    """Squared distance of the centres over the squared diagonal of the hull plus eps."""
    width, height = hull(p, t)
    across = (p[0] + p[2] - t[0] - t[2]).square() + (p[1] + p[3] - t[1] - t[3]).square()
    return across / 4 / (width.square() + height.square() + eps)


def added_iou(p: Columns, t: Columns, eps: float) -> Tensor:
    """IoU with eps added to the union."""
    inter = overlap(p, t)
    return inter / (area(p) + area(t) - inter + eps)


def ciou(p: Columns, t: Columns, eps: float, alpha_grad: bool) -> Tensor:
    """Complete IoU of boxes given as broadcastable columns: one by one, or all against all."""
    iou = added_iou(p, t, eps)
    angle = _aspect(p, eps) - _aspect(t, eps)
    v = (4 / math.pi**2) * angle.square()
    alpha = v / (v - iou + 1 + eps)  # in this order: 1 + eps rounds to 1
    return iou - centre_term(p, t, eps) - (alpha if alpha_grad else alpha.detach()) * v


def _aspect(box: Columns, eps: float) -> Tensor:
    return torch.atan((box[2] - box[0]) / (box[3] - box[1] + eps))


def _overlap_tile(*loss: Any) -> Tile:
    return Tile(kernels.boxes.overlap_kernel, rows=TILE // 8, constants={"LOSS": loss})


@row_loss(
    *_INPUTS,
    samples=_box_samples(
        {"mode": "log", "eps": 1e-6},
        {"mode": "square", "eps": 1e-16},
        {"mode": "linear", "eps": 1e-6},
    ),
    skip=True,
)
def iou_loss(pred: Tensor, target: Tensor, mode: str, eps: float) -> Tensor:
    """-log IoU, 1 - IoU^2 or 1 - IoU, with the IoU at least eps."""
    iou, _ = iou_and_union(columns(pred), columns(target), UNION_EPS)
    iou = iou.clamp(min=eps)
    if mode == "log":
        return -iou.log()
    return 1 - (iou.square() if mode == "square" else iou)


@iou_loss.triton
def _(given: Any) -> Tile:
    return _overlap_tile("iou", UNION_EPS, given.eps, given.mode)


@row_loss(*_INPUTS, samples=_box_samples({"eps": GIOU_EPS}), skip=True)
def giou_loss(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    """1 - IoU + (hull - union) / hull."""
    return 1 - giou(columns(pred), columns(target), eps)


@giou_loss.triton
def _(given: Any) -> Tile:
    return _overlap_tile("giou", given.eps)


@row_loss(*_INPUTS, samples=_box_samples({"eps": YOLOV9_EPS["otx"]}), skip=True)
def diou_loss(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    """1 - IoU + squared centre distance / squared diagonal of the hull."""
    p, t = columns(pred), columns(target)
    return 1 - added_iou(p, t, eps) + centre_term(p, t, eps)


@diou_loss.triton
def _(given: Any) -> Tile:
    return _overlap_tile("diou", given.eps)


@row_loss(
    *_INPUTS,
    samples=_box_samples(
        {"eps": YOLOV9_EPS["otx"], "alpha_grad": True},
        {"eps": YOLOV9_EPS["yolo"], "alpha_grad": False},
    ),
    skip=True,
)
def ciou_loss(pred: Tensor, target: Tensor, eps: float, alpha_grad: bool) -> Tensor:
    """The DIoU loss plus alpha v, v = 4 / pi^2 (difference of the aspect angles)^2."""
    return 1 - ciou(columns(pred), columns(target), eps, alpha_grad)


@ciou_loss.triton
def _(given: Any) -> Tile:
    return _overlap_tile("ciou", given.eps, given.alpha_grad)


def _distance_tile(pred: Tensor, *loss: Any) -> Tile:
    features = power_of_2(pred.shape[-1])
    return Tile(
        kernels.boxes.distance_kernel,
        # Half a tile: with a whole one both gradients spill on sm_80.
        rows=max(TILE // 2 // features, 1),
        constants={"LOSS": loss, "BF": features},
    )


@row_loss(*_INPUTS, samples=_coordinate_samples({}), skip=True)
def l1(pred: Tensor, target: Tensor) -> Tensor:
    """|d|, summed over a row's coordinates."""
    return (pred - target).abs().sum(-1)


@l1.triton
def _(given: Any) -> Tile:
    return _distance_tile(given.pred, "l1")


@row_loss(*_INPUTS, samples=_coordinate_samples({"beta": 1.0}, {"beta": 0.11}), skip=True)
def smooth_l1(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta, summed over a row's coordinates."""
    return F.smooth_l1_loss(pred, target, reduction="none", beta=beta).sum(-1)


@smooth_l1.triton
def _(given: Any) -> Tile:
    return _distance_tile(given.pred, "smooth_l1", float(given.beta))
