"""OTX's methods of one layer at a time, which stay callable.

`forward` computes all layers at once and calls none of them, so a subclass that overrides one is
refused, not ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from detloss_triton.ops.distribution import two_bin
from detloss_triton.reduction import check_reduction
from detloss_triton.shapes import check_mapping
from detloss_triton.targets import Targets, check_images, counts_of, pack

from .arguments import constants
from .denoising import matched_indices
from .matches import Indices, map_of_indices
from .set_prediction import (
    AnyTargets,
    Layers,
    Matches,
    Output,
    SetCriterion,
    as_norm,
    layers_by_shape,
)

# Of D-FINE's distillation.
TEMPERATURE = 5.0

# What OTX's forward calls layer by layer, and subclasses of its criteria may override.
_METHODS = (
    "loss_labels_vfl",
    "loss_boxes",
    "loss_local",
    "fgl_loss",
    "get_cdn_matched_indices",
    "prepare",
    "_available_losses",
    "_get_go_indices",
    "_get_src_permutation_idx",
)


class LayerByLayer(SetCriterion):
    """The methods that both set criteria have."""

    # Our own methods, by which those of a subclass are known to be others.
    _ours: ClassVar[dict[str, Any]] = {}
    # A method that the class overrides in vain.
    _in_vain = ""

    def __init_subclass__(cls, ours: bool = False, **kwargs: Any) -> None:
        """Refuse a subclass whose losses would be ignored.

        Args:
            ours: the class is one of this library's, whose methods are those to be overridden.

        Raises:
            TypeError: for an overridden method that `forward` does not call, where the class has no
                `forward` of its own.
        """
        super().__init_subclass__(**kwargs)
        names = (*_METHODS, "forward")
        if ours:
            cls._ours = {name: inspect.getattr_static(cls, name, None) for name in names}
        *methods, forward = (
            inspect.getattr_static(cls, name, None) is not cls._ours[name] for name in names
        )
        cls._in_vain = next((name for name, new in zip(_METHODS, methods, strict=True) if new), "")
        if not forward:
            cls._refuse_overrides()

    @classmethod
    def get_cdn_matched_indices(
        cls, dn_meta: Mapping[str, Any], targets: AnyTargets
    ) -> list[tuple[Tensor, Tensor]]:
        """The given pairs of denoising queries: per image (query indices, target indices).

        Of `Targets`, the numbers of boxes are read from the device.

        Raises:
            ValueError: for a missing entry, or positives that are not one per box and group.
        """
        return matched_indices(dn_meta, targets, cls.__name__)

    def loss_labels_vfl(
        self, outputs: Output, targets: AnyTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Classification loss of one layer matched by `indices`: per image (queries, targets).

        Varifocal, unless the constructor was given `losses`.
        """
        names = (self.class_loss,) if self.class_loss else ()
        return self._some(names, outputs, targets, indices, num_boxes)

    def loss_boxes(
        self, outputs: Output, targets: AnyTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """L1 and GIoU losses of one layer matched by `indices`: per image (queries, targets)."""
        return self._some(("loss_bbox", "loss_giou"), outputs, targets, indices, num_boxes)

    def _some(self, names: tuple[str, ...], *arguments: Any) -> dict[str, Tensor]:
        return self._of_layers(names, *self._given(*arguments))

    def _of_layers(
        self, names: Sequence[str], layers: Layers, found: Matches, norm: Tensor
    ) -> dict[str, Tensor]:
        """Some losses of matched layers, weighted where OTX's methods weigh them."""
        raise NotImplementedError

    def _given(
        self, outputs: Output, targets: AnyTargets, indices: Any, num_boxes: Any
    ) -> tuple[Layers, Matches, Tensor]:
        """One layer, matched by (query indices, target indices) per image, and its normaliser."""
        name = type(self).__name__
        check_mapping(name, outputs=outputs)
        dtype = self._check_shapes([("", outputs)])
        (layers,) = layers_by_shape([("", outputs)])
        first = layers.boxes[0]
        targets = constants(targets, dtype)
        packed = pack(targets, name, first)
        check_images(name, packed, len(first))
        self._check_num_boxes(num_boxes)
        counts = None if isinstance(targets, Targets) else counts_of(targets)
        found = map_of_indices(indices, layers.n_queries, packed, counts, name)
        return layers, (found, packed), as_norm(num_boxes, first)

    def _check_parts(self) -> None:
        self._refuse_overrides()
        for name in _METHODS:
            if name in self.__dict__:
                self._refuse_overrides(name)
        super()._check_parts()

    @classmethod
    def _refuse_overrides(cls, name: str = "") -> None:
        if name or cls._in_vain:
            raise TypeError(
                f"{cls.__name__} overrides {name or cls._in_vain}, which forward does not call: it "
                "computes all layers at once; override forward, or scale the losses it returns"
            )


class LocalByLayer(LayerByLayer, ours=True):
    """Those that D-FINE has besides."""

    def loss_local(
        self,
        outputs: Output,
        targets: AnyTargets,
        indices: Indices,
        num_boxes: float | Tensor,
        temperature: float = TEMPERATURE,
    ) -> dict[str, Tensor]:
        """Localisation and distillation losses of one layer matched by `indices`, unweighted."""
        given = self._given(outputs, targets, indices, num_boxes)
        return self._local_of_layer(outputs, *given, temperature)

    def _local_of_layer(
        self, outputs: Output, layers: Layers, found: Matches, norm: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    @staticmethod
    def fgl_loss(
        preds: Tensor,
        targets: Tensor,
        weight_right: Tensor,
        weight_left: Tensor,
        iou_weight: Tensor | None = None,
        reduction: str = "sum",
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        """Fine-grained localisation loss: cross-entropy with the two bins around each target.

        Args:
            reduction: "none", "mean" or "sum"; with avg_factor the sum over avg_factor.

        Shapes:
            preds (N, bins) logits; targets (N,) positions in bins, of which the floor is the left
            bin; weight_right, weight_left, iou_weight (N,).
        """
        check_reduction(reduction)
        left = targets.detach().long()
        weight = None if iou_weight is None else iou_weight.detach()
        losses = two_bin(preds, left, weight_left, weight_right, weight=weight, keep=1)
        if avg_factor is not None:
            return losses.sum() / avg_factor
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()
