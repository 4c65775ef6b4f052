"""Our losses in Hugging Face transformers' detectors: RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR,
RF-DETR, DETR, Conditional, Deformable and DAB-DETR.

    from detloss_triton.integrations.transformers import apply_to

    apply_to(model)  # model(pixel_values, labels=labels).loss is ours
    register()  # or: so is every model's of these kinds, in this process

What a model hands to its loss, stacked layers with denoising queries first, is split here, and the
losses have transformers' keys, but for D-FINE's further layers, unless `compatible`. A
`cardinality_error`, which is no loss, is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detloss_triton.criteria.detr import DetrCriterion
from detloss_triton.criteria.dfine import DFINECriterion
from detloss_triton.criteria.set_prediction import CLASS_LOSSES, Layers, Matches, SetCriterion
from detloss_triton.criteria.total import sum_losses
from detloss_triton.matchers import HungarianMatcher

_Model = TypeVar("_Model", bound=nn.Module)
Layer = dict[str, Tensor]

# What is of the last layer, or of all.
_OF_LAST = ("pred_logits", "pred_boxes", "pred_corners", "ref_points", "up", "reg_scale")
_KIND = "ForObjectDetection"
# By the type of a model: under which name transformers looks for its loss, and its loss of classes.
_MODELS = {
    "rt_detr": ("RTDetr", "vfl"),
    "rt_detr_v2": ("RTDetrV2", "vfl"),
    "d_fine": ("DFine", "vfl"),
    "deimv2": ("Deimv2", "mal"),
    "lw_detr": ("LwDetr", "ia_bce"),
    "rf_detr": ("RfDetr", "ia_bce"),
    "detr": ("", "labels"),
    "conditional_detr": ("ConditionalDetr", "focal"),
    "deformable_detr": ("DeformableDetr", "focal"),
    "dab-detr": ("DabDetr", "focal"),
}
# With queries for denoising.
_DENOISING = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
_LOCAL = ("d_fine", "deimv2")


def apply_to(model: _Model, compatible: bool = False) -> _Model:
    """Have a model compute our losses where it is given `labels`, and return it.

    The losses are made of the model's configuration as it is now. They are no part of the model's
    state: a model that was loaded anew computes its own until they are applied to it.

    Args:
        model: a `...ForObjectDetection` of transformers.
        compatible: D-FINE's and DEIMv2's losses as transformers computes them: layer i's
            distributions beside the classes and boxes of layer i-1, of which the last but one has
            none, and no union of matches. Without it, as in D-FINE's paper.

    Raises:
        TypeError: for a model that is none of these.
    """
    config = getattr(model, "config", None)
    is_detector = any(kind.__name__.endswith(_KIND) for kind in type(model).__mro__)
    if getattr(config, "model_type", None) not in _MODELS or not is_detector:
        raise TypeError(
            f"model must be transformers' {_KIND} of one of {', '.join(_MODELS)}, got "
            f"{type(model).__name__}"
        )
    # Not a module: as a part of the model it would not be found.
    model.loss_function = DetectionLoss(config, compatible)  # type: ignore[assignment]
    return model


def register(compatible: bool = False) -> None:
    """Have all models of these kinds compute our losses, those not yet made or loaded included.

    Our losses take the places of transformers' in its `LOSS_MAPPING`. A model of another kind that
    is served from the same place goes on as before, and one whose own `loss_function` was set too.

    Args:
        compatible: as in `apply_to`.
    """
    mapping = _mapping()
    for name, _ in _MODELS.values():
        theirs = mapping.get(f"{name}{_KIND}")
        if theirs is not None:  # an older transformers has not all of them
            ours = _Registered(getattr(theirs, "theirs", theirs), compatible)
            mapping[f"{name}{_KIND}"] = ours


def unregister() -> None:
    """Undo `register`."""
    mapping = _mapping()
    for name, ours in mapping.items():
        mapping[name] = getattr(ours, "theirs", ours)


def _mapping() -> dict[str, Any]:
    from transformers.loss.loss_utils import LOSS_MAPPING

    return LOSS_MAPPING


class _Registered:
    """Our losses of a model that transformers' mapping is asked for; theirs of other models."""

    def __init__(self, theirs: Any, compatible: bool) -> None:
        self.theirs = theirs
        self.compatible = compatible

    def __call__(
        self,
        logits: Tensor,
        labels: Any,
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        *others: Any,
        **named: Any,
    ) -> Any:
        ours = config.model_type in _MODELS
        loss = DetectionLoss(config, self.compatible) if ours else self.theirs
        return loss(logits, labels, device, pred_boxes, config, *others, **named)


class DetectionLoss:
    """What a model of a configuration calls as its loss: (loss, losses by name, other layers)."""

    def __init__(self, config: Any, compatible: bool = False) -> None:
        self.compatible = compatible
        self.criterion, self.weights = _criterion_of(config, compatible)
        self.numbers = None
        if config.model_type in _LOCAL:
            self.numbers = {"up": float(config.up), "reg_scale": float(config.reg_scale)}

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[Mapping[str, Tensor]],
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        enc_outputs_class: Tensor | None = None,
        enc_outputs_coord: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[Layer]]:
        """The arguments are transformers'."""
        targets = [{"labels": t["class_labels"], "boxes": t["boxes"]} for t in labels]
        if self.compatible and self.numbers is not None:
            # transformers clips those of the last layer; made of distances, they may be beyond.
            pred_boxes = pred_boxes.clamp(min=0, max=1)
        last = {"pred_logits": logits, "pred_boxes": pred_boxes}
        stacks = {}
        # DAB-DETR hands over boxes also where it has no logits of other layers.
        if outputs_class is not None and outputs_coord is not None:
            stacks = {"pred_logits": outputs_class, "pred_boxes": outputs_coord}
        if self.weights is None:
            outputs = self._with_denoising(last, layers_of(stacks, 1), others)
        else:
            outputs = {**last, "aux_outputs": layers_of(stacks, 0)[:-1]}
            if enc_outputs_class is not None:
                found = enc_outputs_class, enc_outputs_coord
                outputs["enc_aux_outputs"] = [dict(zip(last, found, strict=True))]
            # Groups of queries are there in training alone.
            self.criterion.train(logits.shape[1] > config.num_queries)
        if not config.auxiliary_loss:
            # RT-DETR's kin count the encoder's layer among these.
            kept = _OF_LAST if self.weights is None else (*_OF_LAST, "enc_aux_outputs")
            outputs = {key: outputs[key] for key in outputs if key in kept} | {"aux_outputs": []}
        losses = self.criterion(outputs, targets)
        others_of = [
            {"logits": x["pred_logits"], "pred_boxes": x["pred_boxes"]}
            for x in outputs["aux_outputs"]
        ]
        if self.weights is None:
            return sum_losses(losses), losses, others_of
        # Their dictionary holds what is not weighed yet.
        sums = [
            weight * sum_losses({k: x for k, x in losses.items() if k.startswith(key)})
            for key, weight in self.weights.items()
        ]
        for ours, theirs in (("_aux_", "_"), ("_enc_0", "_enc"), ("focal", "ce")):
            losses = {key.replace(ours, theirs): x for key, x in losses.items()}
        return torch.stack(sums).sum(), losses, others_of

    def _with_denoising(
        self, last: Layer, layers: list[Layer], others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The criterion's outputs, of layers whose first queries are denoising ones."""
        meta = others.get("denoising_meta_values")
        n = 0 if meta is None else meta["dn_num_split"][0]

        def own(layers: list[Layer]) -> list[Layer]:
            return [{key: x[:, n:] for key, x in layer.items()} for layer in layers]

        encoder = []
        if others.get("enc_topk_logits") is not None:
            found = others["enc_topk_logits"], others["enc_topk_bboxes"]
            encoder = [dict(zip(last, found, strict=True))]
        given = {"dn_meta": meta}
        if self.numbers is None:
            outputs = {**own([last])[0], "aux_outputs": [*own(layers[:-1]), *encoder]}
            return (
                outputs if meta is None else {**outputs, **given, "dn_aux_outputs": cut(layers, n)}
            )
        names = {"pred_corners": "predicted_corners", "ref_points": "initial_reference_points"}
        corners = layers_of({key: others[name] for key, name in names.items()}, 1)
        # In training the first layer is that before the decoder.
        n_before = len(layers) - len(corners)
        # transformers begins with that one too, and so ends one too early.
        paired = layers[:-1] if self.compatible else layers[n_before:]
        paired = [{**a, **b} for a, b in zip(paired, corners, strict=False)]
        teacher = {
            "teacher_corners": corners[-1]["pred_corners"],
            "teacher_logits": last["pred_logits"],
        }
        taught = [{**layer, **teacher} for layer in paired]
        outputs = {**own([last if self.compatible else paired[-1]])[0], **self.numbers}
        if self.compatible:
            outputs["aux_outputs"] = [*own(taught[:-1]), *encoder]
        else:
            outputs |= {"aux_outputs": own(taught[:-1]), "enc_aux_outputs": encoder}
            for before in layers[:n_before]:
                outputs["pre_outputs"] = own([before])[0]
                given["dn_pre_outputs"] = cut([before], n)[0]
        return outputs if meta is None else {**outputs, **given, "dn_outputs": cut(taught, n)}


class _DFineOfTransformers(DFINECriterion):
    """Distillation of denoising queries is balanced by their own pairs, too."""

    def _local(
        self,
        layers: Layers,
        found: Matches,
        norm: Tensor,
        union: Tensor,
        *others: Any,
        **named: Any,
    ) -> dict[str, Tensor]:
        return super()._local(layers, found, norm, found[0][:1], *others, **named)


def layers_of(stacks: Mapping[str, Tensor], dim: int) -> list[Layer]:
    """The layers that are stacked in each of some tensors; none without them."""
    columns = [x.unbind(dim) for x in stacks.values()]
    return [dict(zip(stacks, layer, strict=True)) for layer in zip(*columns, strict=True)]


def cut(layers: list[Layer], n: int) -> list[Layer]:
    """Their first queries."""
    return [{key: x[:, :n] for key, x in layer.items()} for layer in layers]


def _criterion_of(config: Any, compatible: bool) -> tuple[SetCriterion, dict[str, float] | None]:
    """The criterion of a configuration, and what its losses are multiplied with outside of it."""
    kind, (_, classes) = config.model_type, _MODELS[config.model_type]
    key, _ = CLASS_LOSSES[classes]
    settings = {"num_classes": config.num_labels, "losses": [classes, "boxes"]}
    if kind in _DENOISING:
        costs = {
            f"cost_{x}": getattr(config, f"matcher_{x}_cost") for x in ("class", "bbox", "giou")
        }
        settings["matcher"] = HungarianMatcher(
            costs, config.matcher_alpha, config.matcher_gamma, use_focal_loss=config.use_focal_loss
        )
        settings |= {"alpha": config.focal_loss_alpha, "gamma": config.focal_loss_gamma}
        names = [key, "loss_bbox", "loss_giou"]
        if kind in _LOCAL:
            names += ["loss_fgl", "loss_ddf"]
            settings["losses"].append("local")
            of_union = not compatible or getattr(config, "use_dense_one_to_one", False)
            settings |= {"reg_max": config.max_num_bins, "use_uni_set": of_union}
        if classes == "mal":
            settings["mal_alpha"] = config.mal_alpha
        weights = {name: getattr(config, f"weight_{name}") for name in names}
        if kind not in _LOCAL:
            return DetrCriterion(weights, **settings), None
        return (_DFineOfTransformers if compatible else DFINECriterion)(weights, **settings), None
    costs = {f"cost_{x}": getattr(config, f"{x}_cost") for x in ("class", "bbox", "giou")}
    settings["matcher"] = HungarianMatcher(costs, use_focal_loss=classes != "labels")
    if classes == "labels":
        settings["eos_coef"] = config.eos_coefficient
    else:
        settings["alpha"] = config.focal_alpha
    if classes == "ia_bce":
        settings["group_detr"] = config.group_detr
    plain = dict.fromkeys((key, "loss_bbox", "loss_giou"), 1.0)
    return DetrCriterion(plain, **settings), {
        key: 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
