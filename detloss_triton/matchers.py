"""Who is responsible for which target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .ops.alignment import align, real_boxes
from .ops.assignment import optimal_assignment
from .ops.distribution import BIN_MARGIN
from .ops.matching import match_cost
from .ops.regression import Rules, check_rules
from .precision import arithmetic_dtype, at_least_float32
from .settings import described
from .shapes import check_counts, check_mapping, check_numbers, check_shapes
from .targets import Targets, check_images, counts_of, pack

# What OTX's matcher calls one after the other.
_STEPS_OF_OTX = (
    "get_valid_matrix",
    "get_iou_matrix",
    "get_cls_matrix",
    "filter_topk",
    "filter_duplicates",
)


@dataclass(frozen=True)
class Candidates:
    """The matched pairs, in any number M of slots per image.

    Shapes:
        anchor: (B, M) index of the slot's anchor, in [0, A), also where the slot is not used.
        target: (B, M) index of the slot's target.
        score: (B, M) target score of the pair; 0 where the slot is not used. Every matched anchor
            has exactly one used slot.
        used: (B, M).
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

    Of equal metrics of a target those of the first anchors are kept.

    OTX ported this from MultimediaTechLab/YOLO, which has moved on. With rules "yolo", of its
    version 1.0 of December 2025:

    - A centre counts as inside where each of its distances d to the four sides has
      0 <= d / stride <= reg_max - 1.01: on an edge too, but no side may be out of its bins' reach.
    - A target that keeps no anchor so keeps the one of largest metric, wherever that lies, if it is
      above 0; another target may still win it.
    - An anchor kept by several targets takes the one with its largest IoU, the first on ties.
    - The score's largest metric and largest IoU are of the anchors that the target won, not of all.
    - The IoU's denominators have 1e-7 added, not 1e-9.

    `YOLOv9Criterion` has the same argument, which says what this project's losses have otherwise,
    and hands it on.

    A subclass overrides `__call__`, or `match` on which it is built. The steps of OTX's matcher,
    such as `filter_topk`, are not taken one by one, and a subclass that has one is refused.

    Args:
        class_num: number of classes.
        anchors: (A, 2) centres in pixels.
        iou: "iou", "diou" or "ciou".
        topk: anchors kept per target.
        factor: exponents {"iou": 6.0, "cls": 0.5}.
        rules: "otx" or "yolo".
        strides: (A,) in pixels, for "yolo" only.
        reg_max: number of bins of a side's distribution, for "yolo" only.

    Raises:
        TypeError, ValueError: for what is none of these, or "yolo" without strides.

    Memory: on a GPU a float32 tensor of B * T * A, and nothing larger; 5,000 boxes in an image of
    8,400 anchors take 0.16 GiB, and `YOLOv9Criterion` with its two heads twice that. On a CPU none
    that grows with both boxes and anchors.
    """

    def __init__(
        self,
        class_num: int,
        anchors: Tensor,
        iou: Literal["iou", "diou", "ciou"] = "ciou",
        topk: int = 10,
        factor: dict[str, float] | None = None,
        *,
        rules: Rules = "otx",
        strides: Tensor | None = None,
        reg_max: int = 16,
    ) -> None:
        name = type(self).__name__
        if iou not in ("iou", "diou", "ciou"):
            raise ValueError(f"iou must be 'iou', 'diou' or 'ciou', got {iou!r}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        if factor is not None and set(factor) != {"iou", "cls"}:
            raise ValueError(f"factor must have the keys 'iou' and 'cls', got {sorted(factor)}")
        check_shapes(name, anchors=(anchors, ("A", 2)))
        check_rules(name, rules)
        check_counts(name, 1, reg_max=reg_max)
        if rules == "yolo":
            check_shapes(name, anchors=(anchors, ("A", 2)), strides=(strides, ("A",)))
        self.class_num = class_num
        self.anchors = anchors
        self.iou = iou
        self.topk = topk
        self.factor = {"iou": 6.0, "cls": 0.5} if factor is None else factor
        self.rules = rules
        self.strides = strides
        self.reg_max = reg_max

    def align(
        self,
        logits: Sequence[Tensor],
        sides: Sequence[Tensor],
        decoding: Sequence[Tensor],
        targets: Tensor,
        heads: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Index of each anchor's target, -1 for none, and its score: see the op `align`.

        Raises:
            TypeError: for an override of one of OTX's steps, which are not taken one by one here.
        """
        for name in _STEPS_OF_OTX:
            if hasattr(self, name):
                raise TypeError(
                    f"{type(self).__name__} has {name}, which is not called: override match, or "
                    "__call__"
                )
        found: tuple[Tensor, Tensor] = align(
            tuple(logits),
            tuple(sides),
            self.anchors,
            tuple(decoding),
            (self.strides,) if self.rules == "yolo" else (),
            targets,
            iou=self.iou,
            iou_power=self.factor["iou"],
            class_power=self.factor["cls"],
            topk=self.topk,
            heads=heads,
            rules=self.rules,
            reach=self.reg_max - 1 - BIN_MARGIN,
        )
        return found

    def match(self, boxes: Tensor, logits: Tensor, targets: Tensor) -> Candidates:
        """Matched pairs: a slot per anchor.

        Shapes:
            boxes: (B, A, 4) predicted, xyxy in pixels. logits: (B, T, A) of each target's class.
            targets: (B, T, 4) xyxy in pixels; padding without area matches nothing.

        Raises:
            TypeError: as `align`.
        """
        targets = at_least_float32(targets)
        # Each target is a class of its own.
        label = torch.arange(targets.shape[1], device=targets.device).view(1, -1, 1)
        rows = torch.cat([label.to(targets.dtype).expand_as(targets[..., :1]), targets], -1)
        target, score = self.align([logits], [boxes.transpose(1, 2)], [], rows)
        anchor = torch.arange(target.shape[1], device=target.device).expand_as(target)
        return Candidates(anchor, target.clamp(min=0), score, target >= 0)

    def over_anchors(self, candidates: Candidates, values: Tensor, fill: float) -> Tensor:
        """(B, A): each matched anchor's entry of per-slot `values` (B, M), `fill` elsewhere."""
        n_anchors = len(self.anchors)
        out = values.new_full((values.shape[0], n_anchors + 1), fill)
        # Slots not used write to one more column, which is cut off.
        index = candidates.anchor.masked_fill(~candidates.used, n_anchors)
        return out.scatter(1, index, values)[:, :n_anchors]

    def __call__(self, target: Tensor, predict: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Targets of every anchor, as OTX returns them.

        Shapes:
            target: (B, T, 5) rows [class, x1, y1, x2, y2], padded with class -1; a row whose class
                is none of the C matches nothing.
            predict: class logits (B, A, C) and boxes (B, A, 4) xyxy in pixels.
            returns: (B, A, C + 4), target scores of the classes (0 for unmatched anchors) and the
                matched box (the image's first one where unmatched); and the matched mask (B, A).

        Raises:
            TypeError, ValueError: for arguments of other shapes, or on another device than
                `anchors`.
        """
        name = type(self).__name__
        if not isinstance(predict, (tuple, list)) or len(predict) != 2:
            raise TypeError(f"{name}: predict must be (logits, boxes), got {type(predict)}")
        target, logits, boxes = (
            x.detach() if isinstance(x, Tensor) else x for x in (target, *predict)
        )
        check_shapes(
            name,
            anchors=(self.anchors, ("A", 2)),
            **{
                "predict[0]": (logits, ("B", "A", self.class_num)),
                "predict[1]": (boxes, ("B", "A", 4)),
            },
            target=(target, ("B", "T", 5)),
        )
        if target.shape[1] == 0:
            target = nn.functional.pad(target, (0, 0, 0, 1), value=-1)
        labels = target[..., 0].long().clamp(0, self.class_num - 1)
        targets = real_boxes(target, self.class_num).to(arithmetic_dtype(boxes))
        index = labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
        found = self.match(boxes, logits.gather(2, index).transpose(1, 2), targets)
        which = self.over_anchors(found, found.target, 0)
        score = self.over_anchors(found, found.score, 0)
        valid = self.over_anchors(found, found.used, False)
        scores = score.new_zeros(*score.shape, self.class_num)
        scores = scores.scatter(2, labels.gather(1, which).unsqueeze(2), score.unsqueeze(2))
        matched = targets.gather(1, which.unsqueeze(2).expand(-1, -1, 4))
        return torch.cat([scores, matched.to(scores.dtype)], -1), valid


class HungarianMatcher(nn.Module):
    """Optimal one-to-one matching of queries and targets (Carion et al., 2020).

    cost = cost_class * focal class cost + cost_bbox * L1 - cost_giou * GIoU, boxes normalised
    cxcywh, in float32 whatever the inputs; a cost that is not finite counts as 1e10. DETR's first
    term is -cost_class * p of a softmax. DEIMv2 goes over to -p * IoU^iou_order_alpha.

    The criteria call `match`, for all layers at once: that is what a subclass overrides to match
    otherwise. One that overrides `forward` only, or has hooks, is called layer by layer.

    Args:
        cost_dict: factors {"cost_class", "cost_bbox", "cost_giou"}; those left out are 0.
        alpha, gamma: of the focal class cost.
        use_focal_loss: p is of a sigmoid; without, of a softmax.
        change_matcher: score and IoU alone count from epoch `matcher_change_epoch` on, which
            `set_epoch` or a criterion's `epoch` tells.
        iou_order_alpha: the power of the IoU then.

    Raises:
        TypeError: for what is no number (True is none), or a subclass that defines a cost function
            of OTX's, which nothing calls.
        ValueError: for no cost, or one of another name.
    """

    # Whether a subclass has a call of its own, and no `match` that a criterion could use instead.
    has_own_call = False
    # Whether it has a `match` of its own.
    has_own_match = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_own_match = cls.match is not HungarianMatcher.match
        cls.has_own_call = cls.__call__ is not HungarianMatcher.__call__ or (
            cls.forward is not HungarianMatcher.forward and not cls.has_own_match
        )
        of_otx = next((name for name in _COSTS_OF_OTX if hasattr(cls, name)), None)
        if of_otx and not cls.has_own_call and not cls.has_own_match:
            raise TypeError(f"{cls.__name__} defines {of_otx}, which is not called: override match")

    def __init__(
        self,
        cost_dict: Mapping[str, float | int],
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        use_focal_loss: bool = True,
        change_matcher: bool = False,
        iou_order_alpha: float = 1.0,
        matcher_change_epoch: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_mapping(name, cost_dict=cost_dict)
        if not cost_dict or not set(cost_dict) <= set(_COSTS):
            raise ValueError(
                f"{name}: cost_dict must have keys among {_COSTS}, got {list(cost_dict)}"
            )
        check_numbers(name, **cost_dict, alpha=alpha, gamma=gamma, iou_order_alpha=iou_order_alpha)
        check_counts(name, 0, matcher_change_epoch=matcher_change_epoch)
        if iou_order_alpha < 0:
            raise ValueError(f"{name}: iou_order_alpha must not be negative, got {iou_order_alpha}")
        self.cost_dict = dict(cost_dict)
        self.alpha = alpha
        self.gamma = gamma
        self.use_focal_loss = use_focal_loss
        self.change_matcher = change_matcher
        self.iou_order_alpha = iou_order_alpha
        self.matcher_change_epoch = matcher_change_epoch
        self.by_score = False
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, for `change_matcher`."""
        self.by_score = self.change_matcher and epoch >= self.matcher_change_epoch

    def extra_repr(self) -> str:
        return described(self)

    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """(L, B, Q) index of each query's target, -1 for none; all layers and images at once.

        Shapes:
            logits: (L, B, Q, C). boxes: (L, B, Q, 4) normalised cxcywh.
        """
        return self._match(logits.unbind(), boxes.unbind(), targets)

    def match_layers(
        self, logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        """As `match`, from layers that lie apart: they are stacked for a `match` of another's only.

        Shapes:
            logits: L of (B, Q, C). boxes: L of (B, Q, 4) normalised cxcywh.
        """
        if self.has_own_match or "match" in self.__dict__:
            return self.match(torch.stack(list(logits)), torch.stack(list(boxes)), targets)
        return self._match(tuple(logits), tuple(boxes), targets)

    def _match(
        self, logits: tuple[Tensor, ...], boxes: tuple[Tensor, ...], targets: Targets
    ) -> Tensor:
        n_images = len(logits[0])
        check_images(type(self).__name__, targets, n_images)
        cost = match_cost(
            logits,
            boxes,
            targets.labels,
            targets.boxes,
            **{name: float(self.cost_dict.get(name, 0.0)) for name in _COSTS},
            alpha=self.alpha,
            gamma=self.gamma,
            softmax=not self.use_focal_loss,
            iou_power=float(self.iou_order_alpha) if self.by_score else -1.0,
        )
        # Each layer has the same counts; of queries all are there.
        target: Tensor = optimal_assignment(cost.transpose(1, 2), None, targets.counts)
        return target.unflatten(0, (len(logits), n_images))

    def forward(
        self, outputs: Mapping[str, Tensor], targets: Targets | Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per image (query indices ascending, target indices), min(Q, n) pairs.

        Of `Targets`, the numbers of boxes are read from the device.

        Shapes:
            outputs: "pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) normalised cxcywh.
            targets: per image {"labels" (n,), "boxes" (n, 4) normalised cxcywh}, or `Targets`.
        """
        name = type(self).__name__
        logits, boxes = outputs.get("pred_logits"), outputs.get("pred_boxes")
        check_shapes(name, pred_logits=(logits, ("B", "Q", "C")), pred_boxes=(boxes, ("B", "Q", 4)))
        assert logits is not None and boxes is not None
        packed = pack(targets, name, boxes)
        (found,) = self.match(logits.detach()[None], boxes.detach()[None], packed)
        # A stable sort brings the matched queries to the front, in order.
        order = (found < 0).to(torch.int8).sort(dim=1, stable=True).indices
        pairs = []
        for i, n in enumerate(counts_of(targets)):
            queries = order[i, : min(n, found.shape[1])]
            pairs.append((queries, found[i][queries]))
        return pairs

    if TYPE_CHECKING:
        __call__ = forward


_COSTS = ("cost_class", "cost_bbox", "cost_giou")
_COSTS_OF_OTX = ("label_cost", "bbox_cost", "giou_cost", "mask_cost", "build_cost_functions")
