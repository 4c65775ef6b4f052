"""YOLOv9: task-aligned matching; classification, boxes and their distributions; two heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detloss_triton.boxes import ltrb
from detloss_triton.gather import at_anchors
from detloss_triton.losses import BCELoss, BoxLoss, DFLoss
from detloss_triton.matchers import BoxMatcher, Candidates, real_boxes
from detloss_triton.memory import cat
from detloss_triton.ops.classification import binary_cross_entropy
from detloss_triton.ops.coding import distance_decode
from detloss_triton.ops.distribution import two_bin, two_bins
from detloss_triton.ops.regression import YOLOV9_EPS, ciou_loss
from detloss_triton.precision import arithmetic_dtype
from detloss_triton.shapes import check_shapes
from detloss_triton.validate import FINITE, a_box_with_class, check, enabled
from detloss_triton.vec2box import Level, Vec2Box

from .levels import is_ours


class YOLOv9Criterion(nn.Module):
    """Losses of YOLOv9 (Wang et al., 2024, https://arxiv.org/abs/2402.13616).

    Args:
        num_classes: number of classes C.
        vec2box: the anchors, on the predictions' device.
        loss_cls, loss_dfl, loss_iou: default `BCELoss`, `DFLoss`, `BoxLoss`, which run fused on the
            matched anchors only; with another module in any slot all three are called, with OTX's
            arguments.
        reg_max: number of bins of a side's distribution.
        cls_rate, dfl_rate, iou_rate: factors of the three losses.
        aux_rate: factor of the auxiliary head.
    """

    def __init__(
        self,
        num_classes: int,
        vec2box: Vec2Box,
        loss_cls: nn.Module | None = None,
        loss_dfl: nn.Module | None = None,
        loss_iou: nn.Module | None = None,
        reg_max: int = 16,
        cls_rate: float = 0.5,
        dfl_rate: float = 1.5,
        iou_rate: float = 7.5,
        aux_rate: float = 0.25,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.vec2box = vec2box
        self.matcher = BoxMatcher(num_classes, vec2box.anchor_grid)
        self.loss_cls = loss_cls or BCELoss()
        self.loss_dfl = loss_dfl or DFLoss(vec2box, reg_max)
        self.loss_iou = loss_iou or BoxLoss()
        self.cls_rate = cls_rate
        self.dfl_rate = dfl_rate
        self.iou_rate = iou_rate
        self.aux_rate = aux_rate

    def forward(
        self,
        main_preds: Sequence[Level],
        targets: Tensor,
        aux_preds: Sequence[Level] | None = None,
    ) -> dict[str, Tensor] | None:
        """Losses of both heads, each matched by its own predictions.

        Shapes:
            main_preds, aux_preds: per level (classes (B, C, h, w) logits, distributions
                (B, bins, 4, h, w) logits, ltrb distances in strides (B, 4, h, w)).
            targets: (B, T, 5) rows [class, x1, y1, x2, y2] in pixels, padded with class -1; a
                row whose class is none of the C matches nothing.

        Returns:
            {"loss_cls", "loss_df", "loss_iou"} with rates applied and "total_loss", their mean;
            None where T is 0. With nothing matched the normaliser is 1.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or that do not fit `vec2box`.
        """
        check_shapes(type(self).__name__, targets=(targets, ("B", "T", 5)))
        if targets.shape[1] == 0:
            return None
        heads = [main_preds] if aux_preds is None else [main_preds, aux_preds]
        for name, head in zip(("main_preds", "aux_preds"), heads, strict=False):
            self._check_shapes(name, head, len(targets))
            self._check_anchors(head)
        if enabled():
            check(
                self,
                targets=a_box_with_class(self.num_classes)(targets),
                main_preds=FINITE(_by_part(main_preds)),
                aux_preds=FINITE(_by_part(aux_preds or ())),
            )
        self.matcher.anchors = self.vec2box.anchor_grid
        rates = [1.0, self.aux_rate][: len(heads)]
        terms = self._losses(heads, targets)
        cls, dfl, iou = (_weighted(term, rates) for term in terms)
        losses = {
            "loss_cls": self.cls_rate * cls,
            "loss_df": self.dfl_rate * dfl,
            "loss_iou": self.iou_rate * iou,
        }
        return {**losses, "total_loss": torch.stack(list(losses.values())).mean()}

    def _check_shapes(self, name: str, head: Sequence[Level], n_images: int) -> None:
        if not head:
            raise ValueError(
                f"{type(self).__name__}: {name} must have an entry per level, got none"
            )
        # Another module in the slot has bins of its own.
        bins: str | int = "bins"
        if isinstance(self.loss_dfl, DFLoss) and is_ours(self.loss_dfl):
            bins = self.loss_dfl.reg_max
        for i, level in enumerate(head):
            place = f"{type(self).__name__}: {name}, level {i}"
            if not isinstance(level, (tuple, list)) or len(level) != 3:
                raise TypeError(
                    f"{place} must be (classes, distributions, distances), got {type(level)}"
                )
            classes, distributions, distances = level
            check_shapes(
                place,
                classes=(classes, (n_images, self.num_classes, "h", "w")),
                distributions=(distributions, (n_images, bins, 4, "h", "w")),
                distances=(distances, (n_images, 4, "h", "w")),
            )

    def _check_anchors(self, head: Sequence[Level]) -> None:
        grid = self.vec2box.anchor_grid
        n_anchors = sum(boxes.shape[-2:].numel() for _, _, boxes in head)
        if n_anchors != len(grid) or head[0][0].device != grid.device:
            raise ValueError(
                f"predictions of {n_anchors} anchors on {head[0][0].device} do not fit vec2box "
                f"with {len(grid)} on {grid.device}: call vec2box.update(image_size, device)"
            )

    def _losses(
        self, heads: Sequence[Sequence[Level]], targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classification, distribution and box losses, (heads,) each. Heads are matched at once."""
        slots = (self.loss_cls, BCELoss), (self.loss_dfl, DFLoss), (self.loss_iou, BoxLoss)
        if not all(isinstance(loss, kind) and is_ours(loss) for loss, kind in slots):
            return self._losses_as_otx(heads, targets)
        n_heads = len(heads)
        labels = targets[..., 0].long()
        gt_boxes = real_boxes(targets, self.num_classes)
        with torch.no_grad():
            found = self.matcher.match(
                torch.cat([self.vec2box.decode(head) for head in heads]),
                cat([_logits_of(labels, head) for head in heads]),
                gt_boxes.repeat(n_heads, 1, 1),
            )
            norm = _by_head(found.score, heads).sum((1, 2))
            norm = torch.where(norm > 0, norm, 1)
        dtype = arithmetic_dtype(heads[0][0][2])
        pairs = _Pairs(self.vec2box, found, gt_boxes.repeat(n_heads, 1, 1), dtype)
        assert isinstance(self.loss_dfl, DFLoss)
        cls = self._loss_cls(heads, labels.repeat(n_heads, 1), found) / norm
        dfl = pairs.distribution_loss(heads, self.loss_dfl.reg_max) / norm
        return cls, dfl, pairs.box_loss(heads) / norm

    def _loss_cls(
        self, heads: Sequence[Sequence[Level]], labels: Tensor, found: Candidates
    ) -> Tensor:
        with torch.no_grad():
            label = self.matcher.over_anchors(found, labels.gather(1, found.target), -1)
            score = self.matcher.over_anchors(found, found.score, 0)
            sizes = [c.shape[-2:].numel() for c, _, _ in heads[0]]
            labels_by_level = _by_head(label, heads).split(sizes, 2)
            scores_by_level = _by_head(score, heads).split(sizes, 2)
        return torch.stack(
            [
                torch.stack(
                    [
                        binary_cross_entropy(c.flatten(2).transpose(1, 2), lab[h], sco[h], None)
                        for (c, _, _), lab, sco in zip(
                            head, labels_by_level, scores_by_level, strict=True
                        )
                    ]
                ).sum()
                for h, head in enumerate(heads)
            ]
        )

    def _losses_as_otx(
        self, heads: Sequence[Sequence[Level]], targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three modules called with OTX's arguments; box_norm's length is read by the host."""
        terms = []
        for head in heads:
            classes, anchors, boxes = self.vec2box(head)
            aligned, valid = self.matcher(targets, (classes.detach(), boxes.detach()))
            target_cls, target_boxes = self.separate_anchor(aligned)
            cls_norm = target_cls.sum()
            cls_norm = torch.where(cls_norm > 0, cls_norm, 1)
            box_norm = target_cls.sum(-1)[valid]
            boxes = boxes / self.vec2box.scaler.unsqueeze(-1)
            terms.append(
                torch.stack(
                    [
                        self.loss_cls(classes, target_cls, cls_norm),
                        self.loss_dfl(anchors, target_boxes, valid, box_norm, cls_norm),
                        self.loss_iou(boxes, target_boxes, valid, box_norm, cls_norm),
                    ]
                )
            )
        cls, dfl, iou = torch.stack(terms, 1).unbind()
        return cls, dfl, iou

    def separate_anchor(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Split aligned targets (B, A, C + 4) into scores and boxes in strides (B, A, 4)."""
        scores, boxes = anchors.split((self.num_classes, 4), dim=-1)
        return scores, boxes / self.vec2box.scaler.unsqueeze(-1)


def _by_head(x: Tensor, heads: Sequence[Sequence[Level]]) -> Tensor:
    """(heads * B, ...) as (heads, B, ...), also where B is 0."""
    return x.unflatten(0, (len(heads), len(x) // len(heads)))


def _by_part(head: Sequence[Level]) -> list[dict[str, Tensor]]:
    """The levels of a head, their parts under names that an error can use."""
    return [dict(zip(("classes", "distributions", "distances"), x, strict=True)) for x in head]


def _weighted(per_head: Tensor, rates: Sequence[float]) -> Tensor:
    main, *aux = per_head.unbind()
    return main + aux[0] * rates[1] if aux else main


def _logits_of(labels: Tensor, head: Sequence[Level]) -> list[Tensor]:
    """(B, T, n) per level: the logits of each target's class, read in place."""
    n_images, n_classes = head[0][0].shape[:2]
    index = labels.clamp(0, n_classes - 1)
    image = torch.arange(n_images, device=labels.device).unsqueeze(1)

    def of_level(maps: Tensor) -> Tensor:
        if not maps.is_contiguous():
            return maps[image, index]
        # As one dimension it is copied row by row: a fifth of the time on a CPU.
        flat = (image * n_classes + index).flatten()
        return maps.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)

    return [of_level(classes.detach().flatten(2)) for classes, _, _ in head]


class _Pairs:
    """The matched slots of all heads, in strides of their anchors: what box losses compare."""

    def __init__(
        self, vec2box: Vec2Box, found: Candidates, gt_boxes: Tensor, dtype: torch.dtype
    ) -> None:
        self.anchor, self.score = found.anchor, found.score
        # The quotient of two integers would be in torch's default dtype.
        stride = vec2box.scaler[found.anchor].unsqueeze(-1).to(dtype)
        self.centre = vec2box.anchor_grid[found.anchor] / stride
        index = found.target.unsqueeze(-1).expand(-1, -1, 4)
        self.boxes = gt_boxes.gather(1, index) / stride

    def _of(self, heads: Sequence[Sequence[Level]], part: int) -> Tensor:
        return torch.cat(
            [
                at_anchors([level[part].flatten(-2) for level in head], index)
                for head, index in zip(heads, _by_head(self.anchor, heads), strict=True)
            ]
        )

    def box_loss(self, heads: Sequence[Sequence[Level]]) -> Tensor:
        boxes = distance_decode(self._of(heads, 2), self.centre)
        pairs = (boxes, self.boxes)
        return ciou_loss(
            *(_by_head(x, heads) for x in pairs),
            weight=_by_head(self.score, heads),
            keep=1,
            eps=YOLOV9_EPS,
            alpha_grad=True,
        )

    def distribution_loss(self, heads: Sequence[Sequence[Level]], reg_max: int) -> Tensor:
        logits = self._of(heads, 1).transpose(-1, -2)
        left, right_weight = two_bins(ltrb(self.centre, self.boxes), reg_max)
        score = (self.score / 4).unsqueeze(-1).expand(left.shape)
        rows = (logits, left, 1 - right_weight, right_weight, score)
        *inputs, weight = (_by_head(x, heads) for x in rows)
        return two_bin(*inputs, weight=weight, keep=1)
