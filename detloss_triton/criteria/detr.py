"""DETR with varifocal classification, as in RT-DETR: matched layers and denoising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detloss_triton.reduction import EPS32
from detloss_triton.targets import Targets
from detloss_triton.validate import enabled

from .set_prediction import (
    Indices,
    Layers,
    Matched,
    Output,
    SetCriterion,
    box_losses,
    classification_losses,
    count_boxes,
    denoising_map,
    iou_of,
    matched_targets,
    named_losses,
    stack_layers,
)


class DetrCriterion(SetCriterion):
    """Losses of RT-DETR (Zhao et al., 2023, https://arxiv.org/abs/2304.08069).

    Args:
        weight_dict: factors of "loss_vfl", "loss_bbox", "loss_giou"; a loss without one has 1.
        alpha, gamma: of the varifocal loss.
        num_classes: number of classes C.
    """

    def forward(
        self,
        outputs: dict[str, Any],
        targets: Targets | Sequence[Mapping[str, Tensor]],
        num_boxes: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of all layers, each with its own matching.

        Args:
            outputs: {"pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) normalised cxcywh}, and
                optionally "aux_outputs", a list of such dictionaries, and "dn_aux_outputs", one
                over denoising queries, with "dn_meta" = {"dn_positive_idx": per image (n * groups,)
                query indices, "dn_num_group"}. Nothing is written to it.
            targets: per image {"labels" (n,), "boxes" (n, 4) normalised cxcywh}, or `Targets`.
            num_boxes: normaliser; by default the number of boxes averaged over ranks, at least 1.

        Returns:
            "loss_vfl", "loss_bbox", "loss_giou", and these with suffixes `_aux_i`, `_dn_i`; 0-dim.

        Raises:
            ValueError: for missing entries, layers of different shapes, "dn_aux_outputs" without
                "dn_meta", or positives that are not one per box and group.
            TypeError: for a matcher whose `match` is not what it matches by.
        """
        self._check_parts()
        if outputs.get("dn_aux_outputs") and outputs.get("dn_meta") is None:
            raise ValueError("outputs has 'dn_aux_outputs' and so must have 'dn_meta'")
        packed, dn_meta = self.prepare(targets, outputs.get("dn_meta"))
        aux = outputs.get("aux_outputs") or ()
        main = [("", outputs), *((f"_aux_{i}", o) for i, o in enumerate(aux))]
        denoising = [(f"_dn_{i}", o) for i, o in enumerate(outputs.get("dn_aux_outputs") or ())]
        self._check_shapes(main, denoising)
        layers = stack_layers(main)
        if enabled():
            self._check_values(main, denoising, packed, dn_meta, num_boxes)
        norm = count_boxes(packed, num_boxes, outputs["pred_logits"].device)
        own = self.matcher.match(layers.logits, layers.boxes, packed)
        losses = self._losses(layers, matched_targets(own, packed), norm)
        if denoising:
            assert dn_meta is not None
            layers = stack_layers(denoising)
            given = matched_targets(denoising_map(dn_meta, layers.logits.shape[2]), packed)
            losses.update(self._losses(layers, given, norm * max(dn_meta["dn_num_group"], 1)))
        return losses

    def _losses(self, layers: Layers, found: Matched, norm: Tensor) -> dict[str, Tensor]:
        iou = iou_of(layers.boxes, found)
        vfl = classification_losses(layers.logits, iou, found, self.alpha, self.gamma)
        distance, overlap = box_losses(layers.boxes, found)
        values = {
            "loss_giou": overlap / (norm + EPS32),
            "loss_bbox": distance / (norm + EPS32),
            "loss_vfl": vfl / norm,
        }
        return named_losses(
            values, {**dict.fromkeys(values, 1.0), **self.weight_dict}, layers.suffixes
        )

    def loss_labels_vfl(
        self,
        outputs: Output,
        targets: Sequence[Mapping[str, Tensor]],
        indices: Indices,
        num_boxes: float | Tensor,
    ) -> dict[str, Tensor]:
        """Varifocal loss of one layer matched by `indices`, per image (queries, targets)."""
        return self._some(outputs, targets, indices, num_boxes, "loss_vfl")

    def loss_boxes(
        self,
        outputs: Output,
        targets: Sequence[Mapping[str, Tensor]],
        indices: Indices,
        num_boxes: float | Tensor,
    ) -> dict[str, Tensor]:
        """L1 and GIoU losses of one layer matched by `indices`, per image (queries, targets)."""
        return self._some(outputs, targets, indices, num_boxes, "loss_bbox", "loss_giou")

    def _some(
        self,
        outputs: Output,
        targets: Sequence[Mapping[str, Tensor]],
        indices: Indices,
        num_boxes: float | Tensor,
        *names: str,
    ) -> dict[str, Tensor]:
        layers, found, norm = self._given(outputs, targets, indices, num_boxes)
        losses = self._losses(layers, found, norm)
        return {name: losses[name] for name in names}
