"""YOLOv9: task-aligned matching; classification, boxes and their distributions; two heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detloss_triton.engine import unbound
from detloss_triton.losses import BCELoss, BoxLoss, DFLoss
from detloss_triton.matchers import BoxMatcher
from detloss_triton.once import once
from detloss_triton.ops.aligned import aligned, class_norm
from detloss_triton.ops.regression import Rules, check_rules
from detloss_triton.settings import described
from detloss_triton.shapes import check_shapes
from detloss_triton.targets import room
from detloss_triton.validate import FINITE, a_box_with_class, check, enabled, in_pixels
from detloss_triton.vec2box import (
    Level,
    Vec2Box,
    check_vec2box,
    decoded,
    flattened,
    map_sizes,
    why_no_fit,
)

from .arguments import constants, precision_of
from .levels import has_hooks


class YOLOv9Criterion(nn.Module):
    """Losses of YOLOv9 (Wang et al., 2024, https://arxiv.org/abs/2402.13616).

    What is ours runs fused, on the matched anchors only. If vec2box, the matcher, a loss or
    `separate_anchor` is another's or overridden, or a loss has hooks, then all of them are called
    as OTX calls them, one by one; the host reads how many anchors matched.

    Args:
        num_classes: number of classes C.
        vec2box: the anchors, on the predictions' device: ours, OTX's, or any object that has
            `anchor_grid`, `scaler` and `strides`.
        loss_cls, loss_dfl, loss_iou: default `BCELoss`, `DFLoss`, `BoxLoss`.
        reg_max: number of bins of a side's distribution.
        cls_rate, dfl_rate, iou_rate: factors of the three losses.
        aux_rate: factor of the auxiliary head.
        rules: "otx", or "yolo" for the numbers of MultimediaTechLab/YOLO. It then matches by other
            rules (see `BoxMatcher`); the sum of scores that losses are divided by is at least 1;
            the CIoU's alpha is a constant, and its denominators have 1e-7 added; total_loss is the
            sum of the three; and targets without rows have losses. Our parts in the slots have the
            same `rules`; others are called as they are. That project's own loss takes the auxiliary
            head first, and calls the three losses Box, DFL and BCE.

    Attributes:
        matcher: a `BoxMatcher`, or what is put in its place: any callable with its arguments. If
            its `anchors` are those of vec2box, they follow `vec2box.update`.

    Examples:
        One head with one level, and an image with a box of class 3, found by one position.

        >>> import torch
        >>> from detloss_triton import Vec2Box, YOLOv9Criterion
        >>> vec2box = Vec2Box(None, image_size=(32, 32), strides=[8], device="cpu")
        >>> criterion = YOLOv9Criterion(num_classes=5, vec2box=vec2box)
        >>> classes, distributions = torch.zeros(1, 5, 4, 4), torch.zeros(1, 16, 4, 4, 4)
        >>> level = classes, distributions, torch.ones(1, 4, 4, 4)
        >>> losses = criterion([level], torch.tensor([[[3.0, 4.0, 4.0, 20.0, 20.0]]]))
        >>> losses["loss_df"], losses["total_loss"]
        (tensor(4.1589), tensor(10.6283))
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
        *,
        rules: Rules = "otx",
    ) -> None:
        super().__init__()
        check_vec2box(type(self).__name__, vec2box)
        check_rules(type(self).__name__, rules)
        self.rules = rules
        self.num_classes = num_classes
        # Any object will do, see above.
        self.vec2box: Any = vec2box
        anchors, strides = vec2box.anchor_grid, vec2box.scaler if rules == "yolo" else None
        self.matcher: Any = BoxMatcher(
            num_classes, anchors, rules=rules, strides=strides, reg_max=reg_max
        )
        self.loss_cls = BCELoss() if loss_cls is None else loss_cls
        self.loss_dfl: Any = DFLoss(vec2box, reg_max) if loss_dfl is None else loss_dfl
        self.loss_iou = BoxLoss(rules) if loss_iou is None else loss_iou
        self.cls_rate = cls_rate
        self.dfl_rate = dfl_rate
        self.iou_rate = iou_rate
        self.aux_rate = aux_rate
        self._anchors: Tensor = vec2box.anchor_grid
        self._map_sizes = map_sizes(vec2box)

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
                row whose class is none of the C matches nothing. Of any dtype; detached.

        Returns:
            {"loss_cls", "loss_df", "loss_iou"} with rates applied and "total_loss", their mean;
            None where T is 0. With nothing matched the normaliser is 1. Otherwise with rules
            "yolo", see there.

        Raises:
            TypeError, ValueError: for arguments of other shapes; for levels of other sizes, in
                another order or on another device than those of `vec2box`; for a part that would
                not be called.
        """
        dtype = precision_of(self, main_preds=main_preds, aux_preds=aux_preds)
        targets = constants(targets, dtype)
        check_shapes(type(self).__name__, targets=(targets, ("B", "T", 5)))
        if targets.shape[1] == 0:
            if self.rules == "otx":
                return None
            targets = nn.functional.pad(targets, (0, 0, 0, 1), value=-1)
        heads = [main_preds] if aux_preds is None else [main_preds, aux_preds]
        self.follow_vec2box()
        self._check_parts()
        names = ("main_preds", "aux_preds")[: len(heads)]
        # Another module in the slot has bins of its own.
        plain = _is_plain(self.loss_dfl, DFLoss, "forward")
        anchors = self.vec2box.strides, self._map_sizes, self.loss_dfl.reg_max if plain else "bins"
        for name, head in zip(names, heads, strict=True):
            self._check_head(name, head, len(targets), self._anchors, *anchors)
        self._check_shapes(targets=(targets, ("B", "T", 5)))
        if enabled():
            check(
                self,
                targets=a_box_with_class(self.num_classes)(targets),
                main_preds=FINITE(_by_part(main_preds)),
                aux_preds=FINITE(_by_part(aux_preds or ())),
            )
            check(self, targets=in_pixels(self.num_classes)(targets))
        by_head = self._fused(heads, targets) if self._is_ours() else self._as_otx(heads, targets)
        main, *aux = by_head.unbind(1)
        total = torch.add(main, aux[0], alpha=self.aux_rate) if aux else by_head.flatten()
        whole = total.mean() if self.rules == "otx" else total.sum()
        cls, dfl, iou = unbound(total)
        return {"loss_cls": cls, "loss_df": dfl, "loss_iou": iou, "total_loss": whole}

    if TYPE_CHECKING:
        __call__ = forward

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward`, their targets padded to a number of rows that repeats."""
        self.follow_vec2box()
        targets = arguments["targets"]
        n_rows = targets.shape[1]
        if n_rows == 0 and self.rules == "otx":
            return arguments
        rows = (0, 0, 0, room(n_rows) - n_rows)
        return {**arguments, "targets": torch.nn.functional.pad(targets, rows, value=-1)}

    def extra_repr(self) -> str:
        slots = ("vec2box", "matcher", "loss_cls", "loss_dfl", "loss_iou")
        return described(self, **dict.fromkeys(slots, self._is_ours()))

    def _is_ours(self) -> bool:
        """Whether everything that OTX calls is this library's, and nobody listens."""
        losses = (self.loss_cls, BCELoss), (self.loss_dfl, DFLoss), (self.loss_iou, BoxLoss)
        return (
            _is_plain(self, YOLOv9Criterion, "separate_anchor")
            and _is_plain(self.matcher, BoxMatcher, "__call__", "align", "match", "over_anchors")
            and (
                _is_plain(self.vec2box, Vec2Box, "__call__", "decode") or not callable(self.vec2box)
            )
            and all(_is_plain(loss, kind, "__call__", "forward") for loss, kind in losses)
            and not any(has_hooks(loss) for loss, _ in losses)
            and self.loss_dfl.vec2box is self.vec2box
        )

    def follow_vec2box(self) -> None:
        """Have the matcher use the anchors of vec2box where it did, which may be others by now."""
        before = self._anchors
        if getattr(self.vec2box, "anchor_grid", None) is before:
            return
        check_vec2box(type(self).__name__, self.vec2box)
        self._anchors = self.vec2box.anchor_grid
        self._map_sizes = map_sizes(self.vec2box)
        if getattr(self.matcher, "anchors", None) is before:
            self.matcher.anchors = self._anchors
            if getattr(self.matcher, "strides", None) is not None:
                self.matcher.strides = self.vec2box.scaler

    def _check_parts(self) -> None:
        name = type(self).__name__
        if hasattr(self, "_forward") and type(self).forward is YOLOv9Criterion.forward:
            raise TypeError(
                f"{name} has a _forward, which forward does not call: override forward, "
                "separate_anchor or the matcher"
            )
        for slot, kind in (("matcher", BoxMatcher), ("loss_iou", BoxLoss)):
            part = getattr(self, slot)
            if isinstance(part, kind) and part.rules != self.rules:
                raise ValueError(
                    f"{name}: {slot}.rules must be those of the criterion, {self.rules!r}, got "
                    f"{part.rules!r}: hand rules to both"
                )
        if not isinstance(self.matcher, BoxMatcher):
            return
        if self.rules == "yolo":
            self._check_shapes(**{"matcher.strides": (self.matcher.strides, ("A",))})
        self._check_shapes(**{"matcher.anchors": (self.matcher.anchors, ("A", 2))})
        if self.matcher.class_num != self.num_classes:
            raise ValueError(
                f"{name}: matcher.class_num must be num_classes = {self.num_classes}, got "
                f"{self.matcher.class_num}"
            )

    def _check_shapes(self, **arguments: tuple[Any, tuple[str | int, ...]]) -> None:
        """Of arguments on the device of vec2box, with its A anchors."""
        anchors = {"vec2box.anchor_grid": (self._anchors, ("A", 2))}
        check_shapes(type(self).__name__, **anchors, **arguments)

    @once("num_classes")
    def _check_head(
        self,
        name: str,
        head: Sequence[Level],
        n_images: int,
        anchors: Tensor,
        strides: Sequence[int],
        map_sizes: Sequence[tuple[int, int]] | None,
        bins: int | str,
    ) -> None:
        name, device = f"{type(self).__name__}: {name}", anchors.device
        if not isinstance(head, (tuple, list)):
            raise TypeError(f"{name} must be a list with an entry per level, got {type(head)}")
        if len(head) != len(strides):
            raise ValueError(
                f"{name} must have an entry per level, got {len(head) or 'none'} for strides "
                f"{list(strides)} of vec2box"
            )
        for i, level in enumerate(head):
            place = f"{name}, level {i}"
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
            if classes.device != device and classes.numel():
                raise ValueError(
                    f"{place} must be on {device} as vec2box is, got {classes.device}: call "
                    "vec2box.update(image_size, device)"
                )
        sizes = [(boxes.shape[2], boxes.shape[3]) for _, _, boxes in head]
        if map_sizes is None:
            n_anchors = sum(height * width for height, width in sizes)
            if n_anchors != len(anchors):
                raise ValueError(
                    f"{name} must have the {len(anchors)} anchors of vec2box, got "
                    f"{n_anchors} on levels of (h, w) = {sizes}"
                )
            return
        for i, (size, expected) in enumerate(zip(sizes, map_sizes, strict=True)):
            if size != expected:
                raise ValueError(
                    f"{name}, level {i} must have (h, w) = {expected} at stride {strides[i]}, got "
                    f"{size}: {why_no_fit(self.vec2box, sizes, map_sizes)}"
                )

    def _rates(self) -> tuple[float, float, float]:
        return self.cls_rate, self.dfl_rate, self.iou_rate

    def _fused(self, heads: Sequence[Sequence[Level]], targets: Tensor) -> Tensor:
        """Classification, distribution and box losses, (3, heads). Heads are matched at once."""
        levels = [level for head in heads for level in head]
        logits, distributions, distances = zip(*levels, strict=True)
        anchors = self.vec2box.anchor_grid, self.vec2box.scaler
        cells = ([x.detach().flatten(2) for x in part] for part in (logits, distances))
        target, score = self.matcher.align(*cells, anchors, targets, len(heads))
        losses = aligned(
            logits,
            distributions,
            distances,
            (target,),
            (score,),
            anchors,
            (targets,),
            factors=tuple(map(float, self._rates())),
            topk=self.matcher.topk,
            heads=len(heads),
            rules=self.rules,
        )
        return losses.view(3, len(heads))

    def _as_otx(self, heads: Sequence[Sequence[Level]], targets: Tensor) -> Tensor:
        """All parts called with OTX's arguments, in its order; the host reads box_norm's length."""
        terms = []
        for head in heads:
            classes, distributions, boxes = self._flattened(head)
            aligned, valid = self.matcher(targets, (classes.detach(), boxes.detach()))
            target_cls, target_boxes = self.separate_anchor(aligned)
            self._check_shapes(
                **{
                    "classes of vec2box": (classes, ("B", "A", self.num_classes)),
                    "distributions of vec2box": (distributions, ("B", "A", 4, "bins")),
                    "boxes of vec2box": (boxes, ("B", "A", 4)),
                    "mask of matcher": (valid, ("B", "A")),
                    "scores of separate_anchor": (target_cls, ("B", "A", self.num_classes)),
                    "boxes of separate_anchor": (target_boxes, ("B", "A", 4)),
                },
            )
            cls_norm = class_norm(target_cls.sum(), self.rules)
            box_norm = target_cls.sum(-1)[valid]
            boxes = boxes / self.vec2box.scaler.unsqueeze(-1)
            pairs = target_boxes, valid, box_norm, cls_norm
            cls = self.loss_cls(classes, target_cls, cls_norm)
            iou = self.loss_iou(boxes, *pairs)
            dfl = self.loss_dfl(distributions, *pairs)
            losses = zip((cls, dfl, iou), self._rates(), strict=True)
            terms.append(torch.stack([loss * rate for loss, rate in losses]))
        return torch.stack(terms, 1)

    def _flattened(self, head: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
        if callable(self.vec2box):
            classes, distributions, boxes = self.vec2box(head)
            return classes, distributions, boxes
        return *flattened(head), decoded(head, self.vec2box.anchor_grid, self.vec2box.scaler)

    def separate_anchor(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Split aligned targets (B, A, C + 4) into scores and boxes in strides (B, A, 4)."""
        scores, boxes = anchors.split((self.num_classes, 4), dim=-1)
        return scores, boxes / self.vec2box.scaler.unsqueeze(-1)


def _is_plain(x: Any, kind: type, *methods: str) -> bool:
    """Whether x is of a kind, with methods that neither a subclass nor the object overrides."""
    if not isinstance(x, kind):
        return False
    of_class = [getattr(type(x), name) is getattr(kind, name) for name in methods]
    return all(of_class) and not any(name in x.__dict__ for name in methods)


def _by_part(head: Sequence[Level]) -> list[dict[str, Tensor]]:
    """The levels of a head, their parts under names that an error can use."""
    return [dict(zip(("classes", "distributions", "distances"), x, strict=True)) for x in head]
