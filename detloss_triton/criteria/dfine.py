"""D-FINE: varifocal classification, boxes, fine-grained localisation and its self-distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from detloss_triton.ops.matching import union_of_matches
from detloss_triton.ops.queries import distillation_shares, localisation
from detloss_triton.precision import arithmetic_dtype, as_values
from detloss_triton.ranks import are_several
from detloss_triton.shapes import check_counts, check_numbers

from .layer_by_layer import TEMPERATURE, LocalByLayer
from .set_prediction import (
    AnyTargets,
    Layers,
    Matches,
    Output,
    SetCriterion,
    Step,
    as_norm,
    count_boxes,
    named_losses,
)


class DFINECriterion(LocalByLayer, ours=True):
    """Losses of D-FINE (Peng et al., 2024, https://arxiv.org/abs/2410.13842).

    Args:
        weight_dict: factors of "loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"; a loss
            without one is dropped, as in OTX (in `DetrCriterion` it has 1). Other keys weigh
            nothing: they are warned of, and so is a dictionary without the one of classes.
        alpha, gamma: of the classification loss.
        num_classes: number of classes C.
        reg_max: bins of a side's distribution less one, even.
        matcher: as in `DetrCriterion`.
        losses: "boxes", "local", and one of classes, as in `DetrCriterion`: DEIM's are
            ["mal", "boxes", "local"].
        mal_alpha, eos_coef, boxes_weight_format, group_detr: as in `DetrCriterion`.
        use_uni_set: boxes and distributions follow the union of matches; without it each layer's
            own, divided by the number of boxes, as classes.
        union_over_ranks: what divides losses of the union is the mean over ranks of its size, as in
            D-FINE's repository, so that gradients are those of the whole batch; without it, and in
            OTX, each rank's own.

    Examples:
        Two layers, the first of which learns from the last, and the one before the decoder.

        >>> import torch
        >>> from detloss_triton import DFINECriterion
        >>> names = ["loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"]
        >>> criterion = DFINECriterion(dict(zip(names, [1, 5, 2, 0.15, 1.5])), num_classes=5)
        >>> boxes, logits = torch.full((2, 10, 4), 0.5), torch.zeros(2, 10, 5)
        >>> before = {"pred_logits": logits, "pred_boxes": boxes}
        >>> last = {**before, "pred_corners": torch.zeros(2, 10, 4 * 33), "ref_points": boxes}
        >>> teacher = {"teacher_corners": last["pred_corners"], "teacher_logits": logits}
        >>> further = {"aux_outputs": [{**last, **teacher}], "pre_outputs": before}
        >>> box = {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.4]])}
        >>> nothing = {"labels": torch.tensor([]), "boxes": torch.empty(0, 4)}
        >>> outputs = {**last, "up": 0.5, "reg_scale": 4.0, **further}
        >>> losses = criterion(outputs, [box, nothing])
        >>> [name for name in losses if "_aux_" in name]
        ['loss_vfl_aux_0', 'loss_bbox_aux_0', 'loss_giou_aux_0', 'loss_fgl_aux_0', 'loss_ddf_aux_0']
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
    other_losses: ClassVar[dict[str, tuple[str, ...]]] = {
        **SetCriterion.other_losses,
        "local": ("loss_fgl", "loss_ddf"),
    }
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
        *,
        matcher: Any = None,
        losses: Sequence[str] | None = None,
        mal_alpha: float | None = None,
        eos_coef: float = 0.1,
        boxes_weight_format: str | None = None,
        group_detr: int = 1,
        use_uni_set: bool = True,
        union_over_ranks: bool = True,
    ) -> None:
        super().__init__(
            weight_dict,
            alpha,
            gamma,
            num_classes,
            matcher=matcher,
            losses=losses,
            mal_alpha=mal_alpha,
            eos_coef=eos_coef,
            boxes_weight_format=boxes_weight_format,
            group_detr=group_detr,
        )
        name = type(self).__name__
        check_counts(name, 4, reg_max=reg_max)
        if reg_max % 2:
            raise ValueError(f"{name}: reg_max must be even, got {reg_max}")
        self.reg_max = reg_max
        self.use_uni_set = use_uni_set
        self.union_over_ranks = union_over_ranks

    def forward(
        self,
        outputs: dict[str, Any],
        targets: AnyTargets,
        num_boxes: float | Tensor | None = None,
        **metas: Any,
    ) -> dict[str, Tensor]:
        """Losses of all layers.

        Classes follow each layer's own matching; boxes and distributions the union of the matches
        of all layers but denoising ones, whose pairs are given (see `use_uni_set`).

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
            metas: "epoch", for the matcher; "step", "global_step" and "epoch_step", handed over by
                upstream's loops too, are not read.

        Returns:
            The weighted losses, suffixed `_aux_i`, `_pre`, `_enc_i`, `_dn_i`, `_dn_pre`; 0-dim.

        Raises:
            ValueError: for missing entries, layers of different shapes, denoising outputs without
                "dn_meta", or positives that are not one per box and group.
            TypeError: for what is no tensor, or a matcher that cannot be called.
        """
        step = self._step(outputs, targets, num_boxes, metas)
        scales = self._scales(outputs, [*step.main, *step.denoising])
        owns = [self._own_matches(layers, step) for layers in step.main]
        union = self._union([found for found, _ in owns], step)
        counts = []
        if self._reduces_more():
            counts.append((union >= 0).sum(dtype=arithmetic_dtype(outputs["pred_boxes"])))
        norm, *of_union = count_boxes(step.targets, num_boxes, outputs["pred_boxes"], *counts)
        matched = self._matched_norm(norm)
        matched = torch.stack([matched, *of_union]) if of_union else matched
        local = self.other_losses["local"]
        weights = {
            name: self.weight_dict[name]
            for name in self.loss_names
            if name in self.weight_dict and name not in local
        }
        losses = {}
        for layers, own in zip(step.main, owns, strict=True):
            if self.use_uni_set:
                found = union, step.targets
                losses.update(self._query_losses(layers, own, matched, weights, union))
                losses.update(self._local(layers, found, matched, union, scales, by_count=True))
            else:
                losses.update(self._query_losses(layers, own, matched, weights))
                losses.update(self._local(layers, own, matched, union, scales))
        for layers in step.denoising:
            given, of_all = self._given_matches(layers, step), self._denoising_norm(step, norm)
            losses.update(self._query_losses(layers, given, of_all, weights))
            losses.update(self._local(layers, given, of_all, union, scales))
        return losses

    if TYPE_CHECKING:
        __call__ = forward

    def _reduces_more(self) -> bool:
        return self.use_uni_set and self.union_over_ranks and are_several()

    def _union(self, found: list[Tensor], step: Step) -> Tensor:
        """(1, B, Q) the union of all layers' matches; or of the decoder's last, which has as many
        pairs as each."""
        if not self.use_uni_set:
            return found[0][:1]
        matches = found[0] if len(found) == 1 else torch.cat(found)
        union: Tensor = union_of_matches(matches, n_targets=step.targets.labels.shape[1])
        return union

    def _further(self, outputs: Output, kinds: Mapping[str, str]) -> list[tuple[str, Output]]:
        named = super()._further(outputs, kinds)
        if [suffix for suffix, _ in named] != ["_dn_pre"] or outputs.get("dn_outputs") is not None:
            return named
        self._warn("outputs has dn_pre_outputs without dn_outputs: its predictions are not read")
        return []

    def _scales(self, outputs: Output, layers: Sequence[Layers]) -> tuple[Tensor, ...]:
        """up and reg_scale, where a layer has distributions."""
        if not _has_corners([output for each in layers for output in each.outputs]):
            return ()
        return tuple(as_norm(outputs[key], outputs["pred_boxes"]) for key in ("up", "reg_scale"))

    def _check_numbers(self, outputs: Output, layers: Sequence[Output]) -> None:
        if not _has_corners(layers):
            return
        name, device = type(self).__name__, outputs["pred_logits"].device
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

    def _local(
        self,
        layers: Layers,
        found: Matches,
        norm: Tensor,
        union: Tensor,
        scales: tuple[Tensor, ...],
        by_count: bool = False,
        weights: Mapping[str, float | Tensor] | None = None,
        temperature: float = TEMPERATURE,
    ) -> dict[str, Tensor]:
        """Localisation and distillation losses of the layers that have distributions.

        Args:
            norm: of the localisation, or `by_count` the number of pairs.
            union: the pairs by whose number the distillation's two means are balanced.
        """
        every = range(len(layers.outputs))
        with_corners = [i for i in every if layers.outputs[i].get("pred_corners") is not None]
        taught = [i for i in with_corners if layers.outputs[i].get("teacher_corners") is not None]
        if weights is None:
            weights = self.weight_dict if "local" in self.losses else {}
        names = ("loss_fgl", "loss_ddf") if taught else ("loss_fgl",)
        weights = {name: weights[name] for name in names if name in weights}
        if not weights or not with_corners:
            return {}
        ordered = [*taught, *(i for i in with_corners if i not in taught)]
        outputs = [layers.outputs[i] for i in ordered]
        suffixes = [layers.suffixes[i] for i in ordered]
        shares: tuple[Tensor, ...] = ()
        teachers = scores = shares
        matches, targets = found
        if len(matches) > 1:
            matches = torch.stack([matches[i] for i in ordered])
        if "loss_ddf" in weights:
            # The kernel does not read that of a layer which has none.
            own = [layers.outputs[i] for i in (*taught, *taught[:1] * (len(ordered) - len(taught)))]
            teachers, scores = (
                _constants([output[key] for output in own])
                for key in ("teacher_corners", "teacher_logits")
            )
            n_targets = targets.labels.shape[1]
            shares = (distillation_shares(matches[:1], union, norm, n_targets=n_targets),)
        losses = named_losses(
            localisation,
            tuple(as_values(output["pred_corners"]) for output in outputs),
            _constants([output["ref_points"] for output in outputs]),
            tuple(layers.boxes[i].detach() for i in ordered),
            teachers,
            scores,
            (matches,),
            (targets.boxes,),
            shares,
            scales,
            (norm,),
            weights=weights,
            suffixes=suffixes,
            n_taught=len(taught),
            by_count=by_count,
            temperature=float(temperature),
        )
        for suffix in suffixes[len(taught) :]:
            losses.pop(f"loss_ddf{suffix}", None)
        return losses

    def _of_layers(
        self, names: Sequence[str], layers: Layers, found: Matches, norm: Tensor
    ) -> dict[str, Tensor]:
        return self._query_losses(layers, found, norm, dict.fromkeys(names, 1.0))

    def _local_of_layer(
        self, outputs: Output, layers: Layers, found: Matches, norm: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        scales, weights = self._scales(outputs, [layers]), {"loss_fgl": 1.0, "loss_ddf": 1.0}
        return self._local(
            layers, found, norm, found[0], scales, weights=weights, temperature=temperature
        )


def _constants(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Without their gradients; one that all share stays one."""
    if all(x is layers[0] for x in layers):
        return (as_values(layers[0].detach()),) * len(layers)
    return tuple(as_values(x.detach()) for x in layers)


def _has_corners(outputs: Sequence[Output]) -> bool:
    return any(output.get("pred_corners") is not None for output in outputs)
