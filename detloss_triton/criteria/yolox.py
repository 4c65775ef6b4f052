"""YOLOX: objectness of all anchors; classes and boxes of the positives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detloss_triton.engine import rows_at
from detloss_triton.losses import CrossEntropyLoss, IoULoss, L1Loss
from detloss_triton.ops.positives import positives
from detloss_triton.ops.selection import first_set
from detloss_triton.precision import at_least_float32
from detloss_triton.reduction import as_divisor
from detloss_triton.settings import described
from detloss_triton.shapes import check_shapes
from detloss_triton.targets import room
from detloss_triton.validate import (
    FINITE,
    FRACTION,
    POSITIVE,
    XYXY,
    check,
    check_count,
    enabled,
    exactly,
)

from .arguments import constants, precision_of
from .levels import BOX_TERMS, divisor_of, is_ours, term_of


class YOLOXCriterion(nn.Module):
    """Losses of YOLOX (Ge et al., 2021, https://arxiv.org/abs/2107.08430).

    Args:
        num_classes: number of object classes C.
        loss_cls, loss_obj: default binary cross-entropy, summed.
        loss_bbox: default 5 (1 - IoU^2), summed. loss_l1: default L1, summed.
        use_l1: whether `loss_l1` is computed.

    Examples:
        An image of six anchors, of which the second is positive, of class 3.

        >>> import torch
        >>> from detloss_triton import YOLOXCriterion
        >>> criterion = YOLOXCriterion(num_classes=5)
        >>> objectness, scores = torch.zeros(1, 6), torch.zeros(1, 6, 5)
        >>> boxes = torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(1, 6, 4)
        >>> positive = torch.arange(6) == 1
        >>> targets = positive[:, None].float(), torch.eye(5)[[3]], 2 * boxes[:, 0], boxes[:, 0]
        >>> criterion(objectness, scores, boxes, boxes, *targets, 1, 1, positive)
        {'loss_cls': tensor(3.4657), 'loss_bbox': tensor(4.6875), 'loss_obj': tensor(4.1589)}
    """

    def __init__(
        self,
        num_classes: int,
        loss_cls: nn.Module | None = None,
        loss_bbox: nn.Module | None = None,
        loss_obj: nn.Module | None = None,
        loss_l1: nn.Module | None = None,
        use_l1: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_cls = _summed_bce() if loss_cls is None else loss_cls
        if loss_bbox is None:
            loss_bbox = IoULoss(mode="square", eps=1e-16, reduction="sum", loss_weight=5.0)
        self.loss_bbox = loss_bbox
        self.loss_obj = _summed_bce() if loss_obj is None else loss_obj
        self.loss_l1 = L1Loss(reduction="sum") if loss_l1 is None else loss_l1
        self.use_l1 = use_l1

    def forward(
        self,
        flatten_objectness: Tensor,
        flatten_cls_preds: Tensor,
        flatten_bbox_preds: Tensor,
        flatten_bboxes: Tensor,
        obj_targets: Tensor,
        cls_targets: Tensor,
        bbox_targets: Tensor,
        l1_targets: Tensor,
        num_total_samples: Tensor,
        num_pos: Tensor,
        pos_masks: Tensor,
    ) -> dict[str, Tensor]:
        """Losses over N images of A anchors, of which P are positive in all.

        Shapes:
            flatten_objectness (N, A) logits; flatten_cls_preds (N, A, C) logits;
            flatten_bbox_preds (N, A, 4); flatten_bboxes (N, A, 4) decoded xyxy;
            obj_targets (N * A, 1); cls_targets (P, C) soft targets; bbox_targets (P, 4) xyxy;
            l1_targets (P, 4), read where `use_l1`; num_total_samples: divisor of all;
            pos_masks (N * A,) bool, with P entries set; `num_pos` is not read, P is a shape.

        Returns:
            {"loss_cls", "loss_bbox", "loss_obj"[, "loss_l1"]}, 0-dim.

        Raises:
            TypeError, ValueError: for arguments of other shapes, or a `num_total_samples` that is
                no number; on a CPU, for `pos_masks` with another number of entries set than P. A
                GPU is not asked, `DETLOSS_VALIDATE=1` does.
        """
        dtype = precision_of(
            self,
            flatten_objectness=flatten_objectness,
            flatten_cls_preds=flatten_cls_preds,
            flatten_bbox_preds=flatten_bbox_preds,
            flatten_bboxes=flatten_bboxes,
        )
        obj_targets, cls_targets, bbox_targets, l1_targets, pos_masks = constants(
            (obj_targets, cls_targets, bbox_targets, l1_targets, pos_masks), dtype
        )
        check_shapes(
            type(self).__name__,
            flatten_objectness=(flatten_objectness, ("N", "A")),
            flatten_cls_preds=(flatten_cls_preds, ("N", "A", self.num_classes)),
            flatten_bbox_preds=(flatten_bbox_preds, ("N", "A", 4)),
            flatten_bboxes=(flatten_bboxes, ("N", "A", 4)),
        )
        n_rows = flatten_objectness.numel()
        l1: dict[str, Any] = {"l1_targets": (l1_targets, ("P", 4))} if self.use_l1 else {}
        check_shapes(
            type(self).__name__,
            flatten_objectness=(flatten_objectness, ("N", "A")),
            obj_targets=(obj_targets, (n_rows, 1)),
            pos_masks=(pos_masks, (n_rows,)),
            bbox_targets=(bbox_targets, ("P", 4)),
            cls_targets=(cls_targets, ("P", self.num_classes)),
            **l1,
        )
        place = f"{type(self).__name__}: num_total_samples"
        norm = as_divisor(place, num_total_samples, dtype, flatten_objectness.device)
        n_positive = bbox_targets.shape[0]
        if enabled():
            by_image = pos_masks.view(flatten_objectness.shape)
            check(
                self,
                pos_masks=exactly(n_positive, "set entries")(pos_masks.sum()),
                flatten_objectness=FINITE(flatten_objectness),
                flatten_cls_preds=FINITE(flatten_cls_preds),
                flatten_bbox_preds=FINITE(flatten_bbox_preds),
                flatten_bboxes=FINITE(flatten_bboxes),
                obj_targets=FRACTION(obj_targets.reshape(flatten_objectness.shape)),
                cls_targets=FRACTION(cls_targets, positives=by_image),
                bbox_targets=XYXY(bbox_targets, positives=by_image),
                l1_targets=FINITE(l1_targets if self.use_l1 else [], positives=by_image),
                num_total_samples=POSITIVE(num_total_samples),
            )
        check_count(type(self).__name__, "pos_masks", pos_masks, "bbox_targets", n_positive)
        terms = self._terms()
        if terms is not None:
            by, number = divisor_of(norm, flatten_objectness.device)
            losses = positives.unbound(
                (flatten_objectness,),
                (flatten_cls_preds,),
                (flatten_bboxes,),
                (flatten_bbox_preds,) if self.use_l1 else (),
                (obj_targets,),
                (cls_targets,),
                (bbox_targets,),
                (l1_targets,) if self.use_l1 else (),
                (pos_masks,),
                by,
                number=number,
                **terms,
            )
            names = ("loss_cls", "loss_bbox", "loss_obj", "loss_l1")
            return dict(zip(names, losses, strict=False))
        index = first_set(pos_masks, n=n_positive)
        found = index < n_rows
        classes = rows_at(flatten_cls_preds, index)
        loss = {
            "loss_cls": _of_found(self.loss_cls, classes, cls_targets, found),
            "loss_bbox": _of_found(
                self.loss_bbox, rows_at(flatten_bboxes, index), bbox_targets, found
            ),
            "loss_obj": self.loss_obj(flatten_objectness.reshape(-1, 1), obj_targets),
        }
        if self.use_l1:
            raw = rows_at(flatten_bbox_preds, index)
            loss["loss_l1"] = _of_found(self.loss_l1, raw, l1_targets, found)
        return {name: value / norm for name, value in loss.items()}

    if TYPE_CHECKING:
        __call__ = forward

    def _terms(self) -> dict[str, Any] | None:
        """What `positives` computes if it knows the modules."""
        entropy = "binary_cross_entropy"
        classes = term_of(self.loss_cls, entropy, reduction="sum")
        boxes = term_of(self.loss_bbox, *BOX_TERMS, reduction="sum")
        objects = term_of(self.loss_obj, entropy, reduction="sum")
        raw = term_of(self.loss_l1, "l1", reduction="sum") if self.use_l1 else None
        if classes is None or boxes is None or objects is None or (self.use_l1 and raw is None):
            return None
        used = (classes, boxes, objects) if raw is None else (classes, boxes, objects, raw)
        return {
            "box": boxes[0],
            "box_constants": boxes[1],
            "factors": tuple(factor for _, _, factor in used),
        }

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward`, targets padded to a number of rows that repeats.

        Rows without an anchor weigh nothing. What is not read gives way to what is.
        """
        n_rows = len(arguments["bbox_targets"])
        rows = (0, 0, 0, room(n_rows) - n_rows)
        read = ("cls_targets", "bbox_targets", *("l1_targets",) * self.use_l1)
        padded = {name: torch.nn.functional.pad(arguments[name], rows) for name in read}
        return {**arguments, "l1_targets": padded["bbox_targets"], **padded, "num_pos": None}

    def extra_repr(self) -> str:
        slots = ("loss_cls", "loss_bbox", "loss_obj", "loss_l1")
        return described(self, **{slot: is_ours(getattr(self, slot)) for slot in slots})


def _summed_bce() -> CrossEntropyLoss:
    return CrossEntropyLoss(use_sigmoid=True, reduction="sum")


def _of_found(module: nn.Module, pred: Tensor, target: Tensor, found: Tensor) -> Tensor:
    """A loss of the (P, features) rows of positives that were `found` (P,).

    Another library's module gets just these and is not called where there are none, as from OTX.
    """
    ours = is_ours(module)
    if not ours:
        pred, target = pred[found], target[found]
    if len(pred) == 0:
        return at_least_float32(pred).sum()
    return module(pred, target, weight=found.to(torch.float32)) if ours else module(pred, target)
