"""RT-DETR, and DETR with other classification losses: matched layers and denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from detloss_triton.reduction import EPS32

from .layer_by_layer import LayerByLayer
from .set_prediction import AnyTargets, Layers, Matches, count_boxes


class DetrCriterion(LayerByLayer, ours=True):
    """Losses of RT-DETR (Zhao et al., 2023, https://arxiv.org/abs/2304.08069).

    Args:
        weight_dict: factors of "loss_vfl", "loss_bbox", "loss_giou"; a loss without one has 1, as
            in OTX (in `DFINECriterion` it is dropped). Other keys weigh nothing, and are warned of.
        alpha, gamma: of the classification loss.
        num_classes: number of classes C.
        matcher: what finds pairs: a `HungarianMatcher`, another project's, or the factors of the
            costs; by default 2, 5 and 2, of a softmax where the classes are.
        losses: "boxes", and one of classes, by default "vfl": varifocal. "mal" is
            matchability-aware ("loss_mal", DEIM), "focal" ("loss_focal"), "bce" ("loss_bce"),
            "ia_bce" IoU-aware ("loss_ce", LW-DETR), and "labels" a softmax over C + 1 logits, the
            last of no object ("loss_ce", DETR).
        mal_alpha: factor of "mal" at other entries than the label, by default 1.
        eos_coef: weight of queries without an object in "labels".
        boxes_weight_format: "iou" or "giou", by which the GIoU loss of each pair is weighed, and
            "vfl" and "mal" are scored.
        group_detr: groups of queries, each matched by itself in training (Group DETR); the number
            of boxes is that of all groups.

    Examples:
        Two layers, and an image with a box beside one without.

        >>> import torch
        >>> from detloss_triton import DetrCriterion
        >>> weights = {"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2}
        >>> criterion = DetrCriterion(weights, num_classes=5)
        >>> logits, boxes = torch.zeros(2, 10, 5), torch.full((2, 10, 4), 0.5)
        >>> layer = {"pred_logits": logits, "pred_boxes": boxes}
        >>> outputs = {**layer, "aux_outputs": [layer]}
        >>> box = {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.4]])}
        >>> nothing = {"labels": torch.tensor([]), "boxes": torch.empty(0, 4)}
        >>> losses = criterion(outputs, [box, nothing])
        >>> losses["loss_vfl"], losses["loss_giou_aux_0"]
        (tensor(3.9856), tensor(0.4000))
    """

    matched_layers: ClassVar[dict[str, str]] = {"aux_outputs": "_aux_", "enc_aux_outputs": "_enc_"}
    denoising_layers: ClassVar[dict[str, str]] = {"dn_aux_outputs": "_dn_"}

    def forward(
        self,
        outputs: dict[str, Any],
        targets: AnyTargets,
        num_boxes: float | Tensor | None = None,
        **metas: Any,
    ) -> dict[str, Tensor]:
        """Losses of all layers, each with its own matching.

        Args:
            outputs: {"pred_logits" (B, Q, C), "pred_boxes" (B, Q, 4) normalised cxcywh}, and
                optionally lists of such dictionaries: "aux_outputs"; "enc_aux_outputs", whose
                layers may have queries of another number, and one logit each in place of C, of any
                object; and "dn_aux_outputs", over denoising queries, with "dn_meta" =
                {"dn_positive_idx": per image (n * groups,) query indices, "dn_num_group"}. Nothing
                is written to it, and predictions in other entries are warned of.
            targets: per image {"labels" (n,), "boxes" (n, 4) normalised cxcywh}, or `Targets`.
            num_boxes: normaliser; by default the number of boxes averaged over ranks, at least 1.
            metas: "epoch", for the matcher; "step", "global_step" and "epoch_step", handed over by
                upstream's loops too, are not read.

        Returns:
            Losses by key, as "loss_vfl", "loss_bbox", "loss_giou", and these with suffixes
            `_aux_i`, `_enc_i`, `_dn_i`; 0-dim.

        Raises:
            ValueError: for missing entries, layers of different shapes, "dn_aux_outputs" without
                "dn_meta", or positives that are not one per box and group.
            TypeError: for what is no tensor, or a matcher that cannot be called.
        """
        step = self._step(outputs, targets, num_boxes, metas)
        (norm,) = count_boxes(step.targets, num_boxes, outputs["pred_boxes"])
        losses, names, matched = {}, self.loss_names[::-1], self._matched_norm(norm)
        for layers in step.main:
            own = self._own_matches(layers, step)
            losses.update(self._of_layers(names, layers, own, matched))
        for layers in step.denoising:
            given, of_all = self._given_matches(layers, step), self._denoising_norm(step, norm)
            losses.update(self._of_layers(names, layers, given, of_all))
        return losses

    if TYPE_CHECKING:
        __call__ = forward

    def _queries(self, suffix: str) -> str:
        # Matched on its own, a layer of the encoder may have as many as it likes.
        return f"Q of {suffix[1:]}" if suffix.startswith("_enc_") else "Q"

    def _of_layers(
        self, names: Sequence[str], layers: Layers, found: Matches, norm: Tensor
    ) -> dict[str, Tensor]:
        weights = {name: self.weight_dict.get(name, 1.0) for name in names}
        return self._query_losses(layers, found, norm, weights, added=EPS32)
