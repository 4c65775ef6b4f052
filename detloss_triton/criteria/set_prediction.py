"""What the criteria of the DETR family share: layers by shape, matches as maps, losses by name.

Layers of a kind (last, auxiliary, encoder; denoising) nearly always have one shape, so the losses
of all are one call: launches do not grow with the decoder. A match is a map from queries to
targets, -1 where there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from detloss_triton.engine import FusedOp
from detloss_triton.matchers import HungarianMatcher
from detloss_triton.once import once
from detloss_triton.ops.queries import queries
from detloss_triton.precision import arithmetic_dtype, as_values
from detloss_triton.ranks import are_several
from detloss_triton.reduction import rank_means
from detloss_triton.settings import described
from detloss_triton.shapes import check_counts, check_mapping, check_numbers, check_shapes
from detloss_triton.targets import Targets, check_images, counts_of, pack, unpack, with_room
from detloss_triton.validate import (
    CXCYWH,
    DECODED,
    FINITE,
    NORMALISED,
    NOT_ZERO,
    POSITIVE,
    a_class,
    a_query_per_box,
    at_most,
    check,
    enabled,
    no_corners,
)
from detloss_triton.warn import warn_once

from .arguments import constants, precision_of
from .denoising import Positives, positives_of, prepared
from .levels import has_hooks
from .matches import map_of_indices

Output = Mapping[str, Any]
# Per image, as a list of dictionaries or packed.
AnyTargets = Targets | Sequence[Mapping[str, Tensor]]
# (suffix of its losses, output) of each layer.
NamedLayers = Sequence[tuple[str, Output]]
# (1 or L, B, Q) target of each query, -1 for none, and the targets.
Matches = tuple[Tensor, Targets]

# Of each name that `losses` may have for a classification loss: its key, and its formula in the op
# `queries`.
CLASS_LOSSES = {
    "vfl": ("loss_vfl", "varifocal"),
    "mal": ("loss_mal", "matchability"),
    "focal": ("loss_focal", "focal"),
    "bce": ("loss_bce", "bce"),
    "ia_bce": ("loss_ce", "iou_aware"),
    "labels": ("loss_ce", "softmax"),
}
_ARGUMENTS = ("outputs", "targets", "num_boxes")
# What upstream's training loops hand to a criterion besides.
_METAS = ("epoch", "step", "global_step", "epoch_step")
MATCHING_COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}


@dataclass(frozen=True)
class Layers:
    """Outputs of L layers of one kind over B images and Q queries.

    Shapes:
        logits: L of (B, Q, C). boxes: L of (B, Q, 4) normalised cxcywh. suffixes: of the losses'
        names.
    """

    logits: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    suffixes: tuple[str, ...]
    outputs: tuple[Output, ...]

    @property
    def n_queries(self) -> int:
        return self.logits[0].shape[1]


def layers_by_shape(named: NamedLayers) -> list[Layers]:
    """The outputs of layers, given with the suffixes of their losses, by their shapes."""
    groups: list[list[tuple[str, Output]]] = []
    for layer in named:
        shape = layer[1]["pred_logits"].shape
        for group in groups:
            if group[0][1]["pred_logits"].shape == shape:
                group.append(layer)
                break
        else:
            groups.append([layer])
    return [
        Layers(
            tuple(as_values(output["pred_logits"]) for _, output in group),
            tuple(as_values(output["pred_boxes"]) for _, output in group),
            tuple(suffix for suffix, _ in group),
            tuple(output for _, output in group),
        )
        for group in groups
    ]


def as_norm(given: float | Tensor, boxes: Tensor) -> Tensor:
    """A normaliser as a 0-dim tensor: a number is written on the device, not copied to it."""
    dtype = arithmetic_dtype(boxes)
    if isinstance(given, Tensor):
        return given.detach().reshape(()).to(boxes.device, dtype)
    return torch.full((), given, dtype=dtype, device=boxes.device)


def count_boxes(
    targets: Targets, given: float | Tensor | None, boxes: Tensor, *more: Tensor
) -> list[Tensor]:
    """The normalisers: the number of boxes, or the one given, and more counts: averaged over ranks,
    at least 1."""
    norms = [] if given is None else [as_norm(given, boxes)]
    counts = [targets.counts.sum(dtype=arithmetic_dtype(boxes))] if given is None else []
    counts += more
    if counts:
        norms += [mean.clamp(min=1).to(boxes.device) for mean in rank_means(*counts)]
    return norms


def named_losses(
    op: FusedOp,
    *inputs: tuple[Tensor, ...],
    weights: Mapping[str, float | Tensor],
    suffixes: Sequence[str],
    **params: Any,
) -> dict[str, Tensor]:
    """The weighted losses of an op over layers, as scalars by name and suffix.

    The weights name them; one that is a tensor is multiplied with behind the op.
    """
    factors = tuple(1.0 if isinstance(w, Tensor) else float(w) for w in weights.values())
    found = op.unbound(*inputs, losses=" ".join(weights), factors=factors, **params)
    losses = {}
    for loss, (name, suffix) in zip(found, itertools.product(weights, suffixes), strict=True):
        weight = weights[name]
        losses[name + suffix] = loss * weight.view(()) if isinstance(weight, Tensor) else loss
    return losses


@dataclass(frozen=True)
class Step:
    """What a criterion was called with, checked and packed.

    Args:
        main: layers that are matched. denoising: layers whose pairs are given.
        images: the targets as a matcher of another project takes them.
    """

    main: list[Layers]
    denoising: list[Layers]
    targets: Targets
    images: AnyTargets
    positives: Positives | None


class SetCriterion(nn.Module):
    """A criterion over matched layers: its hyperparameters, its matcher, its packing.

    Memory beyond the gradients: the costs, float32 of layers * B * T * Q, with T the largest number
    of boxes in an image, and on the torch backend three copies of them for the host.
    """

    # What is read of each layer's output, where it is there.
    entries: tuple[str, ...] = ("pred_logits", "pred_boxes")
    # The keys of what else `losses` may name.
    other_losses: ClassVar[dict[str, tuple[str, ...]]] = {"boxes": ("loss_bbox", "loss_giou")}
    # What becomes of a loss without a weight.
    without_weight = "it weighs 1"
    # Entries of the outputs that hold further layers, and the suffixes of their losses; one that
    # ends with _ is of a list, and goes on with the layer's number.
    matched_layers: ClassVar[dict[str, str]] = {}
    denoising_layers: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        weight_dict: dict[str, int | float],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
        *,
        matcher: Any = None,
        losses: Sequence[str] | None = None,
        mal_alpha: float | None = None,
        eos_coef: float = 0.1,
        boxes_weight_format: str | None = None,
        group_detr: int = 1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_numbers(name, alpha=alpha, gamma=gamma, eos_coef=eos_coef)
        if mal_alpha is not None:
            check_numbers(name, mal_alpha=mal_alpha)
        check_counts(name, 1, num_classes=num_classes, group_detr=group_detr)
        self.losses = self._chosen(losses)
        self.mal_alpha = mal_alpha
        self.eos_coef = eos_coef
        if boxes_weight_format not in (None, "iou", "giou"):
            raise ValueError(
                f"{name}: boxes_weight_format must be None, 'iou' or 'giou', got "
                f"{boxes_weight_format!r}"
            )
        self.boxes_weight_format = boxes_weight_format
        self.group_detr = group_detr
        self.weight_dict = weight_dict
        if matcher is None or isinstance(matcher, Mapping):
            costs, by_sigmoid = matcher or MATCHING_COSTS, self.formula != "softmax"
            matcher = HungarianMatcher(costs, use_focal_loss=by_sigmoid)
        self.matcher: Any = matcher
        self.alpha = alpha
        self.gamma = gamma
        self.num_classes = num_classes
        self._check_weights()

    @property
    def class_loss(self) -> str:
        """The key of the classification loss; empty without one."""
        return [*(CLASS_LOSSES[x][0] for x in self.losses if x in CLASS_LOSSES), ""][0]

    @property
    def formula(self) -> str:
        """Of the classification loss, in the op `queries`."""
        return [*(CLASS_LOSSES[x][1] for x in self.losses if x in CLASS_LOSSES), "varifocal"][0]

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that `weight_dict` may weigh."""
        others = [key for x, keys in self.other_losses.items() if x in self.losses for key in keys]
        return (self.class_loss, *others) if self.class_loss else tuple(others)

    def extra_repr(self) -> str:
        return described(self, matcher=self._matches_at_once())

    def prepare(
        self, targets: AnyTargets, dn_meta: Mapping[str, Any] | None = None
    ) -> tuple[Targets, dict[str, Any] | None]:
        """Targets and dn_meta as `forward` packs them: call it outside a compiled region."""
        # Whatever predictions will be, boxes keep their precision until then.
        name, targets = type(self).__name__, constants(targets, torch.float64)
        packed = pack(targets, name)
        if dn_meta is None:
            return packed, None
        return packed, prepared(dn_meta, positives_of(dn_meta, packed, targets, name))

    def repeatable(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward` packed, so that their shapes repeat from step to step.

        With several ranks also the normaliser, as these may hold targets of different shapes;
        unless `forward` reduces it with others.
        """
        outputs, num_boxes = arguments["outputs"], arguments.get("num_boxes")
        self._read_metas({k: v for k, v in arguments.items() if k not in _ARGUMENTS})
        targets, dn_meta = self.prepare(arguments["targets"], outputs.get("dn_meta"))
        n_targets = targets.labels.shape[1]
        targets = with_room(targets)
        if dn_meta is not None:
            more = targets.labels.shape[1] - n_targets
            positives = pad(dn_meta["dn_positive_idx"], (0, more), value=-1)
            outputs = {**outputs, "dn_meta": {**dn_meta, "dn_positive_idx": positives}}
        if num_boxes is None and are_several() and not self._reduces_more():
            (num_boxes,) = count_boxes(targets, None, outputs["pred_boxes"])
        return {"outputs": outputs, "targets": targets, "num_boxes": num_boxes}

    def _reduces_more(self) -> bool:
        """Whether ranks are to agree on more than the number of boxes."""
        return False

    def _step(
        self, outputs: Output, targets: AnyTargets, num_boxes: Any, metas: Mapping[str, Any]
    ) -> Step:
        """Check and pack the arguments of `forward`."""
        self._check_parts()
        self._read_metas(metas)
        name = type(self).__name__
        check_mapping(name, outputs=outputs)
        boxes = outputs.get("pred_boxes")
        main = [("", outputs), *self._further(outputs, self.matched_layers)]
        denoising = self._further(outputs, self.denoising_layers)
        if denoising and outputs.get("dn_meta") is None:
            raise ValueError(f"{name}: outputs has denoising layers and so must have 'dn_meta'")
        dtype = self._check_shapes(main, denoising)
        targets = constants(targets, dtype)
        packed = pack(targets, name, boxes if isinstance(boxes, Tensor) else None)
        check_images(name, packed, outputs["pred_logits"].shape[0])
        positives = None
        if denoising:
            positives = positives_of(outputs["dn_meta"], packed, targets, name)
        if num_boxes is not None:
            self._check_num_boxes(num_boxes)
        self._check_weights()
        self._warn_of_unread(outputs)
        if enabled():
            self._check_values(main, denoising, packed, positives, num_boxes)
        return Step(layers_by_shape(main), layers_by_shape(denoising), packed, targets, positives)

    def _read_metas(self, metas: Mapping[str, Any]) -> None:
        """Of what upstream's loops hand over besides, the matcher is told the epoch.

        Raises:
            TypeError: for an argument that they do not hand over.
        """
        for key in metas:
            if key not in _METAS:
                raise TypeError(
                    f"{type(self).__name__}: forward got an unexpected argument {key!r}"
                )
        if "epoch" in metas and isinstance(self.matcher, HungarianMatcher):
            self.matcher.set_epoch(metas["epoch"])

    def _groups(self) -> int:
        """Of queries, each of which is matched by itself; in evaluation there is one."""
        return self.group_detr if self.training else 1

    def _refuse_double(self, layers: NamedLayers) -> None:
        """Raise RuntimeError for predictions of float64 where "triton" was asked for by name."""
        keys = [key for key in self.entries if key.startswith("pred_")]
        precision_of(
            self, **{f"outputs{suffix} {key}": o.get(key) for suffix, o in layers for key in keys}
        )

    def _further(self, outputs: Output, kinds: Mapping[str, str]) -> list[tuple[str, Output]]:
        """(suffix, output) of the layers in some entries; an entry of None is not there."""
        name, named = type(self).__name__, []
        for key, suffix in kinds.items():
            layers = outputs.get(key)
            if layers is None:
                continue
            if not suffix.endswith("_"):
                named.append((suffix, layers))
            elif isinstance(layers, (list, tuple)):
                named += [(f"{suffix}{i}", layer) for i, layer in enumerate(layers)]
            else:
                raise TypeError(
                    f"{name}: outputs[{key!r}] must be a list of dictionaries, one per layer, "
                    f"got {type(layers).__name__}"
                )
        for suffix, layer in named:
            check_mapping(name, **{f"outputs{suffix}": layer})
        return named

    def _own_matches(self, layers: Layers, step: Step) -> Matches:
        """(L, B, Q) target of each query of some layers, and the targets they are matched with."""
        targets, images = step.targets, step.images
        if layers.logits[0].shape[-1] < self.num_classes:
            # The encoder's one class is that of every object.
            targets = Targets(targets.labels.clamp(max=0), targets.boxes, targets.counts)
            images = targets
        if self._matches_at_once():
            logits, boxes = (
                [output[key].detach() for output in layers.outputs]
                for key in ("pred_logits", "pred_boxes")
            )
            return self._match_groups(logits, boxes, targets), targets
        if isinstance(images, Targets):
            images = unpack(images)
        found = []
        for suffix, output in zip(layers.suffixes, layers.outputs, strict=True):
            # The outputs as OTX hands them over: those of the last layer hold the others.
            layer = {key: value for key, value in output.items() if "aux" not in key}
            kind, which = type(self.matcher).__name__, suffix.strip("_") or "last"
            place = f"{type(self).__name__}, matcher {kind}, layer {which}"
            pairs = self.matcher(layer, images)
            counts = counts_of(images)
            found.append(map_of_indices(pairs, layers.n_queries, targets, counts, place))
        return torch.cat(found), targets

    def _match_groups(self, logits: list[Tensor], boxes: list[Tensor], targets: Targets) -> Tensor:
        """(L, B, Q) target of each query: groups of queries are matched as images are."""
        n, (n_images, n_queries, _) = self._groups(), logits[0].shape
        if n > 1:
            if n_queries % n:
                name = type(self).__name__
                raise ValueError(f"{name}: {n_queries} queries are not of {n} groups (group_detr)")
            logits, boxes = (
                [x.unflatten(1, (n, -1)).flatten(0, 1) for x in layers]
                for layers in (logits, boxes)
            )
            targets = Targets(*(x.repeat_interleave(n, 0) for x in targets))
        found: Tensor = self.matcher.match_layers(logits, boxes, targets)
        return found.reshape(len(logits), n_images, n_queries)

    def _given_matches(self, layers: Layers, step: Step) -> Matches:
        """(1, B, Q) target of each denoising query, and the targets."""
        assert step.positives is not None
        return step.positives.map(layers.n_queries), step.targets

    def _query_losses(
        self,
        layers: Layers,
        found: Matches,
        norm: Tensor,
        weights: Mapping[str, float | Tensor],
        union: Tensor | None = None,
        added: float = 0.0,
    ) -> dict[str, Tensor]:
        """Those of the losses of classes and boxes that have weights; for `union` and `added` see
        `ops.queries`."""
        if not weights:
            return {}
        matches, targets = found
        logits, boxes = layers.logits, layers.boxes
        if self.class_loss not in weights:
            logits = tuple(x.detach() for x in logits)
        if set(weights) == {self.class_loss}:
            boxes = tuple(x.detach() for x in boxes)
        return named_losses(
            queries,
            logits,
            boxes,
            (matches,),
            () if union is None else (union,),
            (targets.labels,),
            (targets.boxes,),
            (norm,),
            weights=weights,
            suffixes=layers.suffixes,
            classes=self.formula,
            boxes_weight=self.boxes_weight_format or "none",
            alpha=float(self._alpha()),
            gamma=float(self.gamma),
            added=added,
        )

    def _alpha(self) -> float:
        """What the formula takes for it."""
        if self.formula == "matchability":
            return 1.0 if self.mal_alpha is None else self.mal_alpha
        return self.eos_coef if self.formula == "softmax" else self.alpha

    def _matched_norm(self, norm: Tensor) -> Tensor:
        groups = self._groups()
        return norm * groups if groups > 1 else norm

    def _denoising_norm(self, step: Step, norm: Tensor) -> Tensor:
        assert step.positives is not None
        return norm * max(step.positives.groups, 1)

    def _matches_at_once(self) -> bool:
        """Whether the matcher's `match` is all there is to it: no call of its own, and no hooks."""
        matcher = self.matcher
        return (
            isinstance(matcher, HungarianMatcher)
            and not matcher.has_own_call
            and "forward" not in matcher.__dict__
            and not has_hooks(matcher)
        )

    def _chosen(self, losses: Sequence[str] | None) -> list[str]:
        """The names of the losses to compute.

        Raises:
            ValueError: for a name that is none, or several of classes.
        """
        if losses is None:
            return ["vfl", *self.other_losses]
        name, known = type(self).__name__, (*CLASS_LOSSES, *self.other_losses)
        if isinstance(losses, str) or not set(losses) <= set(known):
            raise ValueError(f"{name}: losses must be a list of {', '.join(known)}, got {losses!r}")
        if len(of_classes := [x for x in losses if x in CLASS_LOSSES]) > 1:
            raise ValueError(f"{name}: losses must have one of classes, got {of_classes}")
        return list(losses)

    def _check_parts(self) -> None:
        """Raise TypeError for a matcher that cannot be called."""
        if not callable(self.matcher):
            raise TypeError(
                f"{type(self).__name__}: matcher must be callable with (outputs, targets), "
                f"got {type(self.matcher).__name__}"
            )
        if self._groups() > 1 and not self._matches_at_once():
            raise TypeError(
                f"{type(self).__name__}: group_detr > 1 needs a HungarianMatcher without a call of "
                f"its own, got {type(self.matcher).__name__}"
            )

    def _check_num_boxes(self, given: Any) -> None:
        name = type(self).__name__
        check_numbers(name, num_boxes=given)
        if not isinstance(given, Tensor) and not 0 < given < float("inf"):
            raise ValueError(f"{name}: num_boxes must be finite and above 0, got {given}")

    def _queries(self, suffix: str) -> str:
        """The name of a layer's number of queries; layers of one name have as many."""
        return "Q"

    def _widths(self, output: Output) -> dict[str, int | str]:
        """What a layer's output must hold, and the last dimension of each."""
        return {"pred_logits": self._n_logits(), "pred_boxes": 4}

    def _n_logits(self) -> int:
        """Of a query: the last is of no object, where there is a softmax."""
        return self.num_classes + (self.formula == "softmax")

    def _check_shapes(self, main: NamedLayers, denoising: NamedLayers = ()) -> torch.dtype:
        """Check that all layers are of the same images and classes; of a kind, of as many queries.
        Answers what is computed in.

        Raises:
            TypeError, ValueError: for a missing entry or a wrong shape; they name layer and entry.
        """
        layers = [*main, *denoising]
        values = [output.get(key) for _, output in layers for key in self.entries]
        dtype = self._check_entries([suffix for suffix, _ in layers], len(main), values)
        if dtype == torch.float64:
            self._refuse_double([*main, *denoising])
        return dtype

    @once("num_classes", "formula", "entries", "reg_max")
    def _check_entries(
        self, suffixes: Sequence[str], n_main: int, values: Sequence[Any]
    ) -> torch.dtype:
        """As `_check_shapes`, of all layers' `entries`; behind the first so many is denoising."""
        name, n = type(self).__name__, len(self.entries)
        arguments: dict[str, tuple[Tensor, tuple[str | int, ...]]] = {}
        outputs = [
            dict(zip(self.entries, values[i * n : (i + 1) * n], strict=True))
            for i in range(len(suffixes))
        ]
        for i, (suffix, output) in enumerate(zip(suffixes, outputs, strict=True)):
            n_queries = self._queries(suffix) if i < n_main else "denoising Q"
            widths = self._widths(output)
            for key in widths:
                if output.get(key) is None:
                    raise ValueError(f"{name}: outputs{suffix} must have a tensor {key!r}")
                if not isinstance(output[key], Tensor):
                    kind = type(output[key]).__name__
                    raise TypeError(f"{name}: outputs{suffix} {key} must be a tensor, got {kind}")
            shape = output["pred_logits"].shape
            if suffix.startswith("_enc_") and shape[-1:] == (1,) and self.formula != "softmax":
                # An encoder may tell objects from background only.
                widths["pred_logits"] = 1
            elif shape[-1:] != (self._n_logits(),):
                more = " + 1" if self.formula == "softmax" else ""
                raise ValueError(
                    f"{name}: outputs{suffix} pred_logits must have shape (B, {n_queries}, "
                    f"num_classes{more}) with num_classes = {self.num_classes}, got {tuple(shape)}"
                )
            for key, width in widths.items():
                arguments[f"outputs{suffix} {key}"] = output[key], ("B", n_queries, width)
        check_shapes(name, **arguments)
        self._check_numbers(outputs[0], outputs)
        return arithmetic_dtype(*(x for key, (x, _) in arguments.items() if " pred_" in key))

    def _check_numbers(self, outputs: Output, layers: Sequence[Output]) -> None:
        """Raise unless the outputs have what numbers their layers need."""

    def _check_values(
        self,
        layers: NamedLayers,
        denoising: NamedLayers,
        targets: Targets,
        positives: Positives | None,
        num_boxes: float | Tensor | None,
    ) -> None:
        """Raise ValueError for values that no layer, target or count may hold; reads the device."""
        n_targets = targets.labels.shape[1]
        is_box = torch.arange(n_targets, device=targets.counts.device) < targets.counts[:, None]
        arguments = {
            "counts": at_most(n_targets, "boxes")(targets.counts),
            "labels": a_class(self.num_classes)(targets.labels, is_box),
            "boxes": CXCYWH(targets.boxes, is_box),
        }
        check(self, **{f"targets[{name!r}]": values for name, values in arguments.items()})
        check(self, **{"targets['boxes']": no_corners(is_box)(targets.boxes, is_box)})
        named = {f"layer {suffix.strip('_') or 'last'}": o for suffix, o in (*layers, *denoising)}
        for key in self.entries:
            given = {place: o for place, o in named.items() if o.get(key) is not None}
            rule = NOT_ZERO if key in ("up", "reg_scale") else FINITE
            check(self, **{key: rule({place: o[key] for place, o in given.items()})})
            if key not in ("pred_boxes", "ref_points"):
                continue
            for place, output in given.items():
                # Sides that a distribution moves may leave the image; a sigmoid does not.
                moved = key == "pred_boxes" and output.get("pred_corners") is not None
                rule = DECODED if moved else NORMALISED
                check(self, **{key: rule({place: output[key]})})
        if positives is not None:
            n_queries = denoising[0][1]["pred_logits"].shape[1]
            rule = a_query_per_box(n_queries, targets.counts)
            check(self, dn_positive_idx=rule(positives.padded()))
        if num_boxes is not None:
            check(self, num_boxes=POSITIVE(num_boxes))

    def _check_weights(self) -> None:
        """Raise TypeError for a weight that is no number; warn of those that weigh nothing, and
        where no classification loss has one."""
        check_mapping(type(self).__name__, weight_dict=self.weight_dict)
        self._check_weights_of(self.weight_dict)

    @once("losses", "other_losses")
    def _check_weights_of(self, weights: Mapping[str, Any]) -> None:
        name = type(self).__name__
        check_numbers(name, **{f"weight_dict[{key!r}]": weight for key, weight in weights.items()})
        unknown = [str(key) for key in weights if key not in self.loss_names]
        faults = []
        if unknown:
            known = ", ".join(self.loss_names)
            faults.append(f"has {', '.join(unknown)}, which weigh nothing: the losses are {known}")
        if self.class_loss not in ("", *weights):
            faults.append(f"has no {self.class_loss}: {self.without_weight}")
        if faults:
            self._warn(f"weight_dict {'; it '.join(faults)}")

    def _warn_of_unread(self, outputs: Output) -> None:
        """Warn of predictions in the outputs that no loss is computed of."""
        read = [*self.matched_layers, *self.denoising_layers]
        unread = [
            key for key, entry in outputs.items() if key not in read and _holds_predictions(entry)
        ]
        if unread:
            self._warn(
                f"outputs has {', '.join(unread)}, whose predictions are not read: further layers "
                f"are read from {', '.join(read)}"
            )

    def _warn(self, message: str) -> None:
        warn_once(f"{type(self).__name__}: {message}")


def _holds_predictions(entry: Any) -> bool:
    layers = entry if isinstance(entry, (list, tuple)) else [entry]
    return any(isinstance(layer, Mapping) and "pred_logits" in layer for layer in layers)
