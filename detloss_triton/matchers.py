"""Who is responsible for which target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ops.matching import task_aligned

# Keeps the normalised metric finite for a target that no prediction meets.
_METRIC_EPS = 1e-9


@dataclass(frozen=True)
class Candidates:
    """The matched pairs among the top-k anchors of each target: T * k slots per image.

    Shapes:
        anchor: (B, T * k) index of the slot's anchor, in [0, A), also where the slot is not used.
        target: (B, T * k) index of the slot's target.
        score: (B, T * k) target score of the pair; 0 where the slot is not used. Every matched
            anchor has exactly one used slot.
        used: (B, T * k).
    """

    anchor: Tensor
    target: Tensor
    score: Tensor
    used: Tensor


class BoxMatcher:
    """Task-aligned assignment of YOLOv9: the top-k anchors of each target by metric.

    metric = [centre strictly inside target] clamp(IoU, 0, 1)^factor["iou"] p_label^factor["cls"].
    An anchor kept by several targets takes the one with its largest metric, the first on ties. The
    score of a pair is metric / (largest metric of the target + 1e-9) * largest IoU of the target.

    Args:
        class_num: number of classes.
        anchors: (A, 2) centres in pixels.
        iou: "iou", "diou" or "ciou".
        topk: anchors kept per target.
        factor: exponents {"iou": 6.0, "cls": 0.5}.

    Memory: two float32 tensors of B * T * A, and nothing larger.
    """

    def __init__(
        self,
        class_num: int,
        anchors: Tensor,
        iou: Literal["iou", "diou", "ciou"] = "ciou",
        topk: int = 10,
        factor: dict[str, float] | None = None,
    ) -> None:
        if iou not in ("iou", "diou", "ciou"):
            raise ValueError(f"iou must be 'iou', 'diou' or 'ciou', got {iou!r}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.class_num = class_num
        self.anchors = anchors
        self.iou = iou
        self.topk = topk
        self.factor = {"iou": 6.0, "cls": 0.5} if factor is None else factor

    def match(self, boxes: Tensor, logits: Tensor, targets: Tensor) -> Candidates:
        """Matched pairs, without a tensor over all anchors beyond the metric.

        Shapes:
            boxes: (B, A, 4) predicted, xyxy in pixels. logits: (B, T, A) of each target's class.
            targets: (B, T, 4) xyxy in pixels; padding without area matches nothing.
        """
        n_images, n_targets, n_anchors = logits.shape
        metric, best_iou = task_aligned(
            *(boxes, logits, self.anchors, targets),
            iou=self.iou,
            iou_power=self.factor["iou"],
            class_power=self.factor["cls"],
        )
        top, anchor = metric.topk(min(self.topk, n_anchors), dim=-1)
        quality = top / (top[..., :1] + _METRIC_EPS) * best_iou.unsqueeze(-1)
        target = torch.arange(n_targets, device=boxes.device).view(1, -1, 1).expand_as(anchor)
        top, anchor, target, quality = (x.flatten(1) for x in (top, anchor, target, quality))
        largest = top.new_zeros(n_images, n_anchors).scatter_reduce(1, anchor, top, "amax")
        wins = (top > 0) & (top == largest.gather(1, anchor))
        first = anchor.new_full((n_images, n_anchors), n_targets)
        first = first.scatter_reduce(1, anchor, torch.where(wins, target, n_targets), "amin")
        used = wins & (target == first.gather(1, anchor))
        return Candidates(anchor, target, torch.where(used, quality, 0), used)

    def over_anchors(self, candidates: Candidates, values: Tensor, fill: float) -> Tensor:
        """(B, A): each matched anchor's entry of per-slot `values` (B, T * k), `fill` elsewhere."""
        n_anchors = len(self.anchors)
        out = values.new_full((values.shape[0], n_anchors + 1), fill)
        # Slots not used write to one more column, which is cut off.
        index = torch.where(candidates.used, candidates.anchor, n_anchors)
        return out.scatter(1, index, values)[:, :n_anchors]

    def __call__(self, target: Tensor, predict: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Targets of every anchor, as OTX returns them.

        Shapes:
            target: (B, T, 5) rows [class, x1, y1, x2, y2], padded with class -1.
            predict: class logits (B, A, C) and boxes (B, A, 4) xyxy in pixels.
            returns: (B, A, C + 4), target scores of the classes (0 for unmatched anchors) and the
                matched box (the image's first one where unmatched); and the matched mask (B, A).
        """
        logits, boxes = predict
        labels, targets = target[..., 0].long().clamp(min=0), target[..., 1:]
        index = labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
        found = self.match(boxes, logits.gather(2, index).transpose(1, 2), targets)
        which = self.over_anchors(found, found.target, 0)
        score = self.over_anchors(found, found.score, 0)
        valid = self.over_anchors(found, found.used, False)
        scores = score.new_zeros(*score.shape, self.class_num)
        scores = scores.scatter(2, labels.gather(1, which).unsqueeze(2), score.unsqueeze(2))
        matched = targets.gather(1, which.unsqueeze(2).expand(-1, -1, 4))
        return torch.cat([scores, matched.to(scores.dtype)], -1), valid
