"""SSD: softmax classification with hard negative mining, smooth L1 boxes, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detloss_triton.ops.dense import is_object
from detloss_triton.ops.mined import by_level, mined
from detloss_triton.precision import as_indices
from detloss_triton.reduction import as_divisor
from detloss_triton.settings import described, fused
from detloss_triton.shapes import check_shapes
from detloss_triton.validate import (
    FINITE,
    NOT_NEGATIVE,
    NOTHING,
    XYXY,
    a_class_or_background,
    check,
    enabled,
)

from .arguments import constants, precision_of
from .levels import divisor_of, is_our_coder, refuse_overrides

# A tensor of all images, or one tensor of each.
Images = Tensor | Sequence[Tensor]


class SSDCriterion(nn.Module):
    """Losses of SSD (Liu et al., 2016, https://arxiv.org/abs/1512.02325).

    Args:
        num_classes: number of object classes C; label C is background.
        bbox_coder: decodes boxes where `reg_decoded_bbox`.
        neg_pos_ratio: hardest negatives taken per positive, at most.
        reg_decoded_bbox: compare decoded boxes, else deltas.
        smoothl1_beta: where smooth L1 turns linear, > 0.

    Examples:
        Two images of six anchors, of which the second has an object of class 3.

        >>> import torch
        >>> from detloss_triton import SSDCriterion
        >>> criterion = SSDCriterion(num_classes=5)
        >>> scores, deltas, anchors = torch.zeros(2, 6, 6), torch.zeros(2, 6, 4), torch.rand(6, 4)
        >>> labels = torch.full((2, 6), 5).index_fill(1, torch.tensor([1]), 3)
        >>> weights = (labels < 5)[..., None].float().expand(2, 6, 4)
        >>> targets = torch.ones(2, 6, 4)
        >>> criterion(scores, deltas, anchors, labels, torch.ones(2, 6), targets, weights, 2)
        {'loss_cls': [tensor([3.5835]), tensor([3.5835])], 'loss_bbox': [tensor(1.), tensor(1.)]}
    """

    def __init__(
        self,
        num_classes: int,
        bbox_coder: Any | None = None,
        neg_pos_ratio: int = 3,
        reg_decoded_bbox: bool = False,
        smoothl1_beta: float = 1.0,
    ) -> None:
        super().__init__()
        if reg_decoded_bbox and bbox_coder is None:
            raise ValueError("bbox_coder is needed where reg_decoded_bbox is set, got None")
        if not smoothl1_beta > 0:
            raise ValueError(f"smoothl1_beta must be positive, got {smoothl1_beta}")
        ratio: Any = neg_pos_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, Integral) or neg_pos_ratio < 0:
            raise ValueError(f"neg_pos_ratio must be an integer, at least 0, got {neg_pos_ratio!r}")
        self.num_classes = num_classes
        self.bbox_coder = bbox_coder
        self.neg_pos_ratio = neg_pos_ratio
        self.reg_decoded_bbox = reg_decoded_bbox
        self.smoothl1_beta = smoothl1_beta

    @fused
    def forward(
        self,
        cls_score: Images,
        bbox_pred: Images,
        anchor: Images,
        labels: Images,
        label_weights: Images,
        bbox_targets: Images,
        bbox_weights: Images,
        avg_factor: float | Tensor,
    ) -> dict[str, list[Tensor]]:
        """Losses of each image.

        Args:
            avg_factor: divisor of both losses, usually the number of positives; 0 counts as 1.

        Shapes, each a tensor, or a list of the N images' tensors, as OTX's head holds anchors:
            cls_score (N, A, C + 1) logits; bbox_pred (N, A, 4);
            anchor (N, A, 4) xyxy, or (A, 4) of all images; labels (N, A) in [0, C];
            label_weights (N, A); bbox_targets, bbox_weights (N, A, 4).

        Returns:
            {"loss_cls": N tensors of shape (1,), "loss_bbox": N 0-dim tensors}.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or an `avg_factor` that is no
                number.
            TypeError: for a subclass that overrides a method of OTX's which is not called.
        """
        if (
            isinstance(anchor, Tensor)
            and isinstance(bbox_pred, Tensor)
            and anchor.shape == bbox_pred.shape[1:]
        ):
            anchor = anchor.expand(bbox_pred.shape)
        tensors = self._tensors(
            cls_score=(cls_score, (self.num_classes + 1,)),
            bbox_pred=(bbox_pred, (4,)),
            anchor=(anchor, (4,)),
            labels=(labels, ()),
            label_weights=(label_weights, ()),
            bbox_targets=(bbox_targets, (4,)),
            bbox_weights=(bbox_weights, (4,)),
        )
        scores, codes, anchors, label, weights, targets, box_weights = tensors
        levels = [scores.unsqueeze(1)], [codes.unsqueeze(1)]
        return self.of_levels(*levels, anchors, label, weights, targets, box_weights, avg_factor)

    if TYPE_CHECKING:
        __call__ = forward

    def of_levels(
        self,
        cls_score: Sequence[Tensor],
        bbox_pred: Sequence[Tensor],
        anchor: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor | None,
        avg_factor: float | Tensor,
        coder: Any = None,
    ) -> dict[str, list[Tensor]]:
        """As `forward`, of predictions that stay where they lie, level by level.

        Args:
            coder: encodes bbox_targets, boxes of which those of no size count for nothing; then
                bbox_weights is None.

        Shapes, with k shapes of anchors at each of a level's n positions:
            cls_score (N, k, n, C + 1) and bbox_pred (N, k, n, 4) of each level; anchor (A, 4) or
            (N, A, 4) and the others as tensors in `forward`, with the A anchors level by level, and
            of a level shape by shape.
        """
        refuse_overrides(self, "_forward")
        dtype = precision_of(self, cls_score=cls_score, bbox_pred=bbox_pred)
        anchors, label, weights, targets, box_weights = constants(
            (anchor, labels, label_weights, bbox_targets, bbox_weights), dtype
        )
        anchors = anchors.expand(*label.shape, 4)
        place = f"{type(self).__name__}: avg_factor"
        norm = as_divisor(place, avg_factor, dtype, label.device)
        if enabled():
            rows = [[x.flatten(1, 2) for x in levels] for levels in (cls_score, bbox_pred)]
            scores, codes = (x if len(x) > 1 else x[0] for x in rows)
            check(
                self,
                cls_score=FINITE(scores),
                bbox_pred=FINITE(codes),
                anchor=XYXY(anchors),
                labels=a_class_or_background(self.num_classes)(label, weights),
                label_weights=NOT_NEGATIVE(weights),
                bbox_targets=FINITE(targets, box_weights),
                avg_factor=NOT_NEGATIVE(norm),
            )
            if box_weights is not None:
                check(self, bbox_weights=NOT_NEGATIVE(box_weights))
                positive = is_object(label, self.num_classes)
                check(self, bbox_weights=NOTHING(box_weights, ~positive))
        decode = self._term() if coder is None else ("targets", (*coder.means, *coder.stds))
        if self.reg_decoded_bbox and decode is None:
            bbox_pred = self._decoded(anchors, bbox_pred)
        name, decode_constants = decode or ("", ())
        by, number = divisor_of(norm, label.device)
        losses = mined.unbound(
            tuple(cls_score),
            (as_indices(label),),
            (weights,),
            tuple(bbox_pred),
            (anchors,) if decode else (),
            (targets,),
            () if box_weights is None else (box_weights,),
            by,
            number=number,
            ratio=self.neg_pos_ratio,
            beta=float(self.smoothl1_beta),
            decode=name,
            decode_constants=decode_constants,
            n_rows=len(label),
        )
        n = len(label)
        return {"loss_cls": losses[:n], "loss_bbox": losses[n:]}

    def extra_repr(self) -> str:
        if self.bbox_coder is None:
            return described(self)
        return described(self, bbox_coder=is_our_coder(self.bbox_coder))

    def _tensors(self, **arguments: tuple[Any, tuple[int, ...]]) -> list[Tensor]:
        """Each argument (N, A, *features), lists of the images' tensors as one tensor."""
        place = type(self).__name__
        out: dict[str, tuple[Any, tuple[str | int, ...]]] = {}
        for name, (value, features) in arguments.items():
            each: tuple[str | int, ...] = ("A", *features)
            if isinstance(value, (list, tuple)) and value:
                check_shapes(
                    place, **{f"{name}, image {i}": (x, each) for i, x in enumerate(value)}
                )
                value = torch.stack(list(value))
            out[name] = value, ("N", *each)
        check_shapes(place, **out)
        return [value for value, _ in out.values()]

    def _term(self) -> tuple[str, tuple[float, ...]] | None:
        """How boxes are decoded if `mined` does it."""
        if not (self.reg_decoded_bbox and is_our_coder(self.bbox_coder)):
            return None
        term: tuple[str, tuple[float, ...]] = self.bbox_coder.term()  # type: ignore[union-attr]
        return term if term[0] == "deltas" else None

    def _decoded(self, anchors: Tensor, codes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Boxes of each level; another library's coder is called image by image, as from OTX."""
        decode: Any = self.bbox_coder.decode  # type: ignore[union-attr]
        rows = torch.cat([level.flatten(1, 2) for level in codes], 1)
        if is_our_coder(self.bbox_coder) or len(rows) == 0:
            boxes: Tensor = decode(anchors, rows)
        else:
            boxes = torch.stack([decode(*image) for image in zip(anchors, rows, strict=True)])
        return by_level(boxes, [level.shape[1:3] for level in codes])
