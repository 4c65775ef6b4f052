"""What matching computes over pairs of predictions and targets. No gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backend, blocks
from ..backend import kernels
from ..boxes import columns
from ..op import Sample, direct
from .regression import added_iou, centre_term, ciou

# YOLOv9's own; small enough that in float32 it only keeps 0 / 0 away.
_EPS = 1e-9


def _task_aligned_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    def boxes(*shape: int) -> Tensor:
        low = torch.rand(*shape, 2, generator=generator) * 40
        return torch.cat([low, low + 4 + torch.rand(*shape, 2, generator=generator) * 30], -1)

    anchors = torch.rand(rows, 2, generator=generator) * 64
    pred, targets = boxes(2, rows), boxes(2, 3)
    pred[:, : rows // 4] = targets[:, :1]
    targets[1, 2] = 0.0
    logits = torch.randn(2, 3, rows, generator=generator) * 3
    for iou, iou_power, class_power in (("ciou", 6.0, 0.5), ("diou", 2.0, 1.0), ("iou", 1.0, 0.0)):
        params = {"iou": iou, "iou_power": iou_power, "class_power": class_power}
        yield Sample((pred, logits, anchors, targets), params)


@direct(samples=_task_aligned_samples)
def task_aligned(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    """Task-aligned metric (Feng et al., 2021, https://arxiv.org/abs/2108.07755) of all pairs.

    metric = [anchor strictly inside target] clamp(IoU, 0, 1)^iou_power p^class_power.

    Args:
        iou: "iou", "diou" or "ciou".

    Shapes:
        boxes (B, A, 4) xyxy, logits (B, T, A) of each target's class, anchors (A, 2) centres,
        targets (B, T, 4) xyxy. Returns the metric (B, T, A) and each target's largest clamped IoU
        over all anchors (B, T), both float32.
    """
    n_images, n_targets, n_anchors = logits.shape
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    metric = logits.new_empty(logits.shape, dtype=dtype)
    best = logits.new_zeros((n_images, n_targets), dtype=dtype)
    if n_anchors == 0:
        return metric, best
    all_boxes = columns(boxes.to(dtype).unsqueeze(1))
    all_targets = columns(targets.to(dtype).unsqueeze(2))
    x, y = anchors.to(dtype).unbind(-1)
    for image in blocks.slices(n_images, n_targets * n_anchors, boxes.device):
        for rows in blocks.slices(n_targets, n_anchors, boxes.device):
            at = (image, rows)
            p = tuple(c[image] for c in all_boxes)
            t = tuple(c[at] for c in all_targets)
            score = _SIMILARITY[iou](p, t).clamp(0, 1)
            inside = (x > t[0]) & (y > t[1]) & (x < t[2]) & (y < t[3])
            pair = score.pow(iou_power) * logits[at].to(dtype).sigmoid().pow(class_power)
            metric[at] = torch.where(inside, pair, 0)
            best[at] = score.amax(-1)
    return metric, best


_SIMILARITY = {
    "iou": lambda p, t: added_iou(p, t, _EPS),
    "diou": lambda p, t: added_iou(p, t, _EPS) - centre_term(p, t, _EPS),
    "ciou": lambda p, t: ciou(p, t, _EPS, alpha_grad=False),
}


@task_aligned.triton
def _(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    iou: str,
    iou_power: float,
    class_power: float,
) -> tuple[Tensor, Tensor]:
    n_images, n_targets, n_anchors = logits.shape
    metric = logits.new_empty(logits.shape, dtype=torch.float32)
    if metric.numel() == 0:
        return metric, logits.new_zeros((n_images, n_targets), dtype=torch.float32)
    block = 256
    n_blocks = -(-n_anchors // block)
    best = metric.new_empty((n_images, n_targets, n_blocks))
    backend.launch(
        kernels.matching.task_aligned_kernel,
        (n_images * n_targets * n_blocks,),
        boxes.device,
        p_boxes=boxes,
        p_logits=logits,
        p_anchors=anchors,
        p_targets=targets,
        p_metric=metric,
        p_best=best,
        **dict(zip(("s_boxes_b", "s_boxes_a", "s_boxes_f"), boxes.stride(), strict=True)),
        **dict(zip(("s_logits_b", "s_logits_t", "s_logits_a"), logits.stride(), strict=True)),
        **dict(zip(("s_anchors_a", "s_anchors_f"), anchors.stride(), strict=True)),
        **dict(zip(("s_targets_b", "s_targets_t", "s_targets_f"), targets.stride(), strict=True)),
        n_targets=n_targets,
        n_anchors=n_anchors,
        n_blocks=n_blocks,
        IOU=iou,
        IOU_POWER=float(iou_power),
        CLASS_POWER=float(class_power),
        EPS=_EPS,
        BA=block,
    )
    return metric, best.amax(-1)
