"""D-FINE: varifocal classification, boxes, fine-grained localisation and its self-distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from detloss_triton.boxes import cxcywh_to_xyxy, ltrb
from detloss_triton.matchers import union_of_matches
from detloss_triton.ops.distribution import distillation, two_bin
from detloss_triton.shapes import check_counts, check_numbers

from .layer_by_layer import TEMPERATURE, LocalByLayer
from .matches import Matched, matched_targets
from .set_prediction import (
    AnyTargets,
    Layers,
    NamedLayers,
    Output,
    SetCriterion,
    as_norm,
    box_losses,
    classification_losses,
    iou_of,
    named_losses,
)

# The distillation's means weigh as the square roots of their sizes, counted per batch of 8.
_REFERENCE_BATCH = 8
_SIZE_EPS = 1e-16


class DFINECriterion(LocalByLayer, ours=True):
    """Losses of D-FINE (Peng et al., 2024, https://arxiv.org/abs/2410.13842).

    Args:
        weight_dict: factors of "loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"; a loss
            without one is dropped, as in OTX (in `DetrCriterion` it has 1). Other keys weigh
            nothing: they are warned of, and so is a dictionary without "loss_vfl".
        alpha, gamma: of the varifocal loss.
        num_classes: number of classes C.
        reg_max: bins of a side's distribution less one, even.
    """

    entries = (
        *SetCriterion.entries,
        "pred_corners",
        "ref_points",
        "teacher_corners",
        "teacher_logits",
        "up",
        "reg_scale",
    )
    loss_names = (*SetCriterion.loss_names, "loss_fgl", "loss_ddf")
    without_weight = "no classification loss is computed"
    matched_layers: ClassVar[dict[str, str]] = {
        "aux_outputs": "_aux_",
        "pre_outputs": "_pre",
        "enc_aux_outputs": "_enc_",
    }
    denoising_layers: ClassVar[dict[str, str]] = {"dn_outputs": "_dn_", "dn_pre_outputs": "_dn_pre"}

    def __init__(
        self,
        weight_dict: dict[str, int | float],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        reg_max: int = 32,
    ) -> None:
        super().__init__(weight_dict, alpha, gamma, num_classes)
        name = type(self).__name__
        check_counts(name, 4, reg_max=reg_max)
        if reg_max % 2:
            raise ValueError(f"{name}: reg_max must be even, got {reg_max}")
        self.reg_max = reg_max

    def forward(
        self,
        outputs: dict[str, Any],
        targets: AnyTargets,
        num_boxes: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of all layers.

        Classes follow each layer's own matching; boxes and distributions the union of the matches
        of all layers but denoising ones, whose pairs are given.

        Args:
            outputs: "pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) normalised cxcywh, "up" and
                "reg_scale" (1,) or numbers; for distributions "pred_corners"
                (B, Q, 4 (reg_max + 1)) and "ref_points" (B, Q, 4) normalised cxcywh, and where a
                layer is distilled "teacher_corners" and "teacher_logits". Optional further layers
                with the same entries: "aux_outputs", "enc_aux_outputs", "dn_outputs" (lists),
                "pre_outputs", and with "dn_outputs" also "dn_pre_outputs". A layer of the encoder
                may have one logit in place of C, of any object. Denoising needs "dn_meta" =
                {"dn_positive_idx": per image (n * groups,) query indices, "dn_num_group"}. Nothing
                is written to it, and predictions in other entries are warned of.
            targets: per image {"labels" (n,), "boxes" (n, 4) normalised cxcywh}, or `Targets`.
            num_boxes: normaliser; by default the number of boxes averaged over ranks, at least 1.

        Returns:
            The weighted losses, suffixed `_aux_i`, `_pre`, `_enc_i`, `_dn_i`, `_dn_pre`; 0-dim.

        Raises:
            ValueError: for missing entries, layers of different shapes, denoising outputs without
                "dn_meta", or positives that are not one per box and group.
            TypeError: for what is no tensor, or a matcher that cannot be called.
        """
        step = self._step(outputs, targets, num_boxes)
        bins = self._bins(outputs, [*step.main, *step.denoising])
        owns = [self._own_matches(layers, step) for layers in step.main]
        matches = owns[0][0] if len(owns) == 1 else torch.cat([found for found, _ in owns])
        most_matched = union_of_matches(matches, step.targets.labels.shape[1])
        union = matched_targets(most_matched, step.targets)
        union_norm = union.matched.sum().clamp(min=1)
        balance = _balance(union.matched, step.norm.dtype)
        losses = {}
        for layers, found in zip(step.main, owns, strict=True):
            own = matched_targets(*found)
            losses.update(self._losses(layers, own, step.norm, union, union_norm, balance, bins))
        for layers in step.denoising:
            given, norm = self._given_matches(layers, step), self._denoising_norm(step)
            losses.update(self._losses(layers, given, norm, given, norm, balance, bins))
        return losses

    def _further(self, outputs: Output, kinds: Mapping[str, str]) -> list[tuple[str, Output]]:
        named = super()._further(outputs, kinds)
        if [suffix for suffix, _ in named] != ["_dn_pre"] or outputs.get("dn_outputs") is not None:
            return named
        self._warn("outputs has dn_pre_outputs without dn_outputs: its predictions are not read")
        return []

    def _bins(self, outputs: Output, layers: Sequence[Layers]) -> tuple[Tensor, Tensor] | None:
        """(bin positions, reg_scale), where a layer has distributions."""
        if not _has_corners([output for each in layers for output in each.outputs]):
            return None
        up, reg_scale = (
            as_norm(outputs[key], outputs["pred_boxes"]) for key in ("up", "reg_scale")
        )
        return bin_positions(self.reg_max, up, reg_scale), reg_scale

    def _check_shapes(self, main: NamedLayers, denoising: NamedLayers = ()) -> None:
        super()._check_shapes(main, denoising)
        if not _has_corners([output for _, output in (*main, *denoising)]):
            return
        name, (_, outputs) = type(self).__name__, main[0]
        device = outputs["pred_logits"].device
        for key in ("up", "reg_scale"):
            number = outputs.get(key)
            if number is None:
                raise ValueError(f"{name}: outputs has 'pred_corners' and so must have {key!r}")
            check_numbers(name, **{f"outputs {key}": number})
            if isinstance(number, Tensor) and number.device != device:
                raise ValueError(f"{name}: outputs {key} must be on {device}, got {number.device}")

    def _widths(self, output: Output) -> dict[str, int | str]:
        widths = super()._widths(output)
        if output.get("pred_corners") is not None:
            n_logits = 4 * (self.reg_max + 1)
            widths.update({"pred_corners": n_logits, "ref_points": 4})
            if output.get("teacher_corners") is not None:
                # The most likely class weighs: how many there are does not matter.
                widths.update({"teacher_corners": n_logits, "teacher_logits": "teacher's C"})
        return widths

    def _losses(
        self,
        layers: Layers,
        own: Matched,
        norm: Tensor,
        union: Matched,
        union_norm: Tensor,
        balance: Tensor,
        bins: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Losses of layers of one kind; `balance` is what the distillation's two means weigh."""
        values, iou = self._values(layers, own, norm, union, union_norm)
        weights = self.weight_dict
        losses = named_losses(values, weights, layers.suffixes)
        iou = iou if own is union else iou_of(layers.boxes, union)
        return {**losses, **self._local(layers, union, iou, union_norm, balance, bins, weights)}

    def _values(
        self, layers: Layers, own: Matched, norm: Tensor, union: Matched, union_norm: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(L,) losses without distributions, unweighted, and the IoU of the own matches."""
        iou = iou_of(layers.boxes, own)
        vfl = classification_losses(layers.logits, iou, own, self.alpha, self.gamma)
        distance, overlap = box_losses(layers.boxes, union)
        values = {
            "loss_vfl": vfl / norm,
            "loss_bbox": distance / union_norm,
            "loss_giou": overlap / union_norm,
        }
        return values, iou

    def _local(
        self,
        layers: Layers,
        found: Matched,
        iou: Tensor,
        norm: Tensor,
        balance: Tensor,
        bins: tuple[Tensor, Tensor] | None,
        weights: Mapping[str, float],
        temperature: float = TEMPERATURE,
    ) -> dict[str, Tensor]:
        """Localisation and distillation losses of the layers that have distributions."""
        with_corners = [
            i for i, o in enumerate(layers.outputs) if o.get("pred_corners") is not None
        ]
        if not with_corners:
            return {}
        assert bins is not None
        n_sides = (4, self.reg_max + 1)
        taught = [i for i in with_corners if layers.outputs[i].get("teacher_corners") is not None]
        corners, student = _and_some(
            layers.stacked("pred_corners", with_corners).unflatten(-1, n_sides),
            [with_corners.index(i) for i in taught],
        )
        points = layers.stacked("ref_points", with_corners).detach()
        left, right_weight = box_bins(points, found.boxes, *bins)
        _, used = _and_some(iou * found.matched, with_corners)
        weight = used.unsqueeze(-1).expand(left.shape)
        fgl = two_bin(corners, left, 1 - right_weight, right_weight, weight=weight, keep=1) / norm
        losses = named_losses(
            {"loss_fgl": fgl}, weights, [layers.suffixes[i] for i in with_corners]
        )
        if taught:
            teacher = layers.stacked("teacher_corners", taught).detach().unflatten(-1, n_sides)
            best = layers.stacked("teacher_logits", taught).detach().amax(-1)
            confidence = best.to(iou.dtype).sigmoid()
            _, iou_of_taught = _and_some(iou, taught)
            weight = torch.where(found.matched, iou_of_taught, confidence)
            weight = weight * _shares(found.matched, balance)
            ddf = distillation(
                student,
                teacher.expand(student.shape),
                weight=weight.unsqueeze(-1).expand(student.shape[:-1]).contiguous(),
                keep=1,
                temperature=temperature,
            )
            suffixes = [layers.suffixes[i] for i in taught]
            losses.update(named_losses({"loss_ddf": ddf}, weights, suffixes))
        return losses

    def _of_layer(self, layers: Layers, found: Matched, norm: Tensor) -> dict[str, Tensor]:
        values, _ = self._values(layers, found, norm, found, norm)
        return {name: value.squeeze(0) for name, value in values.items()}

    def _local_of_layer(
        self, outputs: Output, layers: Layers, found: Matched, norm: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        iou, balance = iou_of(layers.boxes, found), _balance(found.matched, norm.dtype)
        bins, weights = self._bins(outputs, [layers]), {"loss_fgl": 1.0, "loss_ddf": 1.0}
        return self._local(layers, found, iou, norm, balance, bins, weights, temperature)


def _and_some(stacked: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A stack and some of its layers: a view where they are neighbours."""
    if not layers:
        return stacked, stacked[:0]
    first, n = layers[0], len(layers)
    if list(layers) == list(range(first, first + n)):
        return stacked, stacked[first : first + n]
    return stacked, torch.stack([stacked[i] for i in layers])


def _has_corners(outputs: Sequence[Output]) -> bool:
    return any(output.get("pred_corners") is not None for output in outputs)


def _balance(matched: Tensor, dtype: torch.dtype) -> Tensor:
    """(2,) what the distillation's means over matched and other sides weigh: a and b over a + b."""
    n_images, n_queries = matched.shape[-2:]
    n_matched = 4.0 * matched.sum().to(dtype)
    sizes = torch.stack([n_matched, 4.0 * n_images * n_queries - n_matched])
    roots = (sizes * (_REFERENCE_BATCH / n_images)).sqrt()
    return roots / roots.sum()


def _shares(matched: Tensor, balance: Tensor) -> Tensor:
    """(..., B, Q) each side's factor, so that a weighted sum is the balanced sum of two means."""
    n_matched = 4.0 * matched.sum().to(balance.dtype)
    n_others = 4.0 * matched.numel() - n_matched
    at_matched, at_others = (balance / torch.stack([n_matched, n_others]).clamp(min=1)).unbind()
    return torch.where(matched, at_matched, at_others)


def bin_positions(reg_max: int, up: Tensor, reg_scale: Tensor) -> Tensor:
    """(reg_max + 1,) W(n), the distances the bins stand for.

    [-2u, 1 - s^(R/2-1), ..., 1 - s, 0, s - 1, ..., s^(R/2-1) - 1, 2u] with u = |up| |reg_scale| and
    s = (u + 1)^(2 / (R - 2)): fine near 0, coarse far off.
    """
    u = (up.detach().abs() * reg_scale.detach().abs()).view(())
    n = torch.arange(reg_max + 1, device=up.device) - reg_max // 2
    size = (u + 1).pow(2 / (reg_max - 2)).pow(n.abs()) - 1
    size = torch.where(n.abs() == reg_max // 2, 2 * u, size)
    return n.sign() * size


def box_bins(
    points: Tensor, boxes: Tensor, positions: Tensor, reg_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(left bin, weight of the bin to its right) of each side's target distance.

    d / (size / reg_scale + 1e-16) - reg_scale / 2, size the reference's width or height; beyond the
    bins, the outermost has all the weight.

    Shapes:
        points: (L, B, Q, 4) reference boxes cxcywh. boxes: (L or 1, B, Q, 4) targets cxcywh.
        positions: (R + 1,). Returns two of (L, B, Q, 4), sides l, t, r, b.
    """
    dtype = positions.dtype
    points, boxes = points.to(dtype), boxes.to(dtype)
    scale = reg_scale.detach().to(dtype).abs().view(())
    size = points[..., 2:].repeat(1, 1, 1, 2) / scale + _SIZE_EPS
    corners = cxcywh_to_xyxy(boxes).expand_as(points)
    distances = ltrb(points[..., :2], corners) / size - scale / 2
    last = len(positions) - 1
    bins = torch.searchsorted(positions.to(dtype), distances.contiguous(), right=True) - 1
    left = bins.clamp(0, last - 1)
    low, high = positions[left], positions[left + 1]
    return left, ((distances - low) / (high - low)).clamp(0, 1)
