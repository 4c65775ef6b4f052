"""What the criteria of the DETR family share: stacked layers, matches as maps, losses per layer.

Every layer of a kind (last, auxiliary, encoder; denoising) has the same shape, so they are stacked
and each loss runs once: launches do not grow with the decoder. A match is a map from queries to
targets, -1 where there is none: predictions are never gathered, gradients never scattered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton.boxes import cxcywh_to_xyxy
from detloss_triton.gather import settled
from detloss_triton.matchers import HungarianMatcher
from detloss_triton.memory import stack
from detloss_triton.ops.classification import varifocal
from detloss_triton.ops.regression import giou_loss, iou_loss, l1
from detloss_triton.reduction import rank_means, unbound
from detloss_triton.shapes import check_shapes
from detloss_triton.targets import Targets, joined, pack, padded_index
from detloss_triton.validate import (
    CXCYWH,
    FINITE,
    NOT_NEGATIVE,
    a_class,
    a_query_per_box,
    at_most,
    check,
)

_GIOU_EPS = 1e-6

Output = Mapping[str, Any]
Indices = Sequence[tuple[Tensor, Tensor]]
# (suffix of its losses, output) of each layer.
NamedLayers = Sequence[tuple[str, Output]]

# What OTX's forward calls layer by layer, and subclasses of its criteria may override.
_PER_LAYER = ("loss_labels_vfl", "loss_boxes", "loss_local", "fgl_loss", "get_cdn_matched_indices")

MATCHING_COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}


@dataclass(frozen=True)
class Layers:
    """Outputs of L layers of one kind over B images and Q queries.

    Shapes:
        logits: (L, B, Q, C). boxes: (L, B, Q, 4) normalised cxcywh. suffixes: of the losses' names.
    """

    logits: Tensor
    boxes: Tensor
    suffixes: tuple[str, ...]
    outputs: tuple[Output, ...]

    def stacked(self, key: str, layers: Sequence[int]) -> Tensor:
        """One entry of some layers as (len(layers), ...); an entry they share is not copied."""
        tensors = [self.outputs[i][key] for i in layers]
        if all(t is tensors[0] for t in tensors):
            return tensors[0].expand(len(tensors), *tensors[0].shape)
        return stack(tensors)


def stack_layers(named: NamedLayers) -> Layers:
    """Stack the outputs of layers of one shape, given with the suffixes of their losses."""
    return Layers(
        stack([output["pred_logits"] for _, output in named]),
        stack([output["pred_boxes"] for _, output in named]),
        tuple(suffix for suffix, _ in named),
        tuple(output for _, output in named),
    )


@dataclass(frozen=True)
class Matched:
    """Each query's target, read off a map.

    Shapes:
        target_of_query: (L, B, Q) int64, -1 for none. matched: (L, B, Q) bool.
        labels: (L, B, Q), -1 for none. boxes: (L, B, Q, 4) normalised cxcywh, 0 for none.
    """

    target_of_query: Tensor
    matched: Tensor
    labels: Tensor
    boxes: Tensor


def matched_targets(target_of_query: Tensor, targets: Targets) -> Matched:
    """Look the targets of a map (L, B, Q) up."""
    matched = target_of_query >= 0
    n_layers = len(target_of_query)
    index = torch.where(matched, target_of_query, 0)
    labels = targets.labels.expand(n_layers, -1, -1).gather(2, index)
    boxes = targets.boxes.expand(n_layers, -1, -1, -1)
    boxes = boxes.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 4))
    return Matched(
        target_of_query,
        matched,
        torch.where(matched, labels, -1),
        torch.where(matched.unsqueeze(-1), boxes, 0),
    )


def iou_of(boxes: Tensor, found: Matched) -> Tensor:
    """(L, B, Q): IoU of each query's box with its target, 0 without one; no gradient."""
    with torch.no_grad():
        pairs = cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(found.boxes).expand_as(boxes)
        missed = iou_loss(*pairs, mode="linear", eps=0.0, keep=3)
        return torch.where(found.matched, 1 - missed, 0)


def classification_losses(
    logits: Tensor, iou: Tensor, found: Matched, alpha: float, gamma: float
) -> Tensor:
    """(L,): varifocal losses, summed."""
    labels = settled(found.labels.expand(logits.shape[:-1]))
    return varifocal(logits, labels, iou, None, keep=1, alpha=alpha, gamma=gamma)


def box_losses(boxes: Tensor, found: Matched) -> tuple[Tensor, Tensor]:
    """(L,), (L,): L1 and GIoU losses of the matched queries, summed."""
    weight = found.matched.to(torch.float32).expand(boxes.shape[:-1])
    target = found.boxes.expand(boxes.shape)
    # A query without a target is blanked: whatever its box holds, its gradient is 0.
    boxes = torch.where(found.matched.unsqueeze(-1), boxes, 0)
    distance = l1(boxes, target, weight=weight, keep=1)
    overlap = giou_loss(
        *(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target)), weight=weight, keep=1, eps=_GIOU_EPS
    )
    return distance, overlap


def as_norm(given: float | Tensor, device: torch.device) -> Tensor:
    """A normaliser as a 0-dim tensor: a number is written on the device, not copied to it."""
    if isinstance(given, Tensor):
        return given.to(device, torch.float32)
    return torch.full((), given, dtype=torch.float32, device=device)


def count_boxes(targets: Targets, given: float | Tensor | None, device: torch.device) -> Tensor:
    """The normaliser: the number of boxes, averaged over ranks, at least 1; or the one given."""
    if given is not None:
        return as_norm(given, device)
    (mean,) = rank_means(targets.counts.sum())
    return mean.clamp(min=1).to(device)


def named_losses(
    values: Mapping[str, Tensor], weights: Mapping[str, float], suffixes: Sequence[str]
) -> dict[str, Tensor]:
    """Cut (L,) losses into weighted scalars by name and suffix; one without a weight is dropped."""
    losses = {}
    for name, value in values.items():
        if name in weights:
            for suffix, loss in zip(suffixes, unbound(value * weights[name]), strict=True):
                losses[name + suffix] = loss
    return losses


def map_of_indices(indices: Indices, n_queries: int) -> Tensor:
    """(1, B, Q) target of each query, from one pair (query indices, target indices) per image."""
    device = indices[0][0].device
    out = torch.full((len(indices), n_queries), -1, dtype=torch.int64, device=device)
    for row, (queries, found) in zip(out, indices, strict=True):
        row[queries.to(device)] = found.to(row)
    return out.unsqueeze(0)


def prepare(
    targets: Targets | Sequence[Mapping[str, Tensor]], dn_meta: Mapping[str, Any] | None
) -> tuple[Targets, dict[str, Any] | None]:
    """Pack targets, and with them the denoising queries' positives, as tensors of bucketed shape.

    `dn_positive_idx` becomes (B, groups, T): the query of each target in each group, -1 for none.

    Raises:
        ValueError: if an image's positives are not one per box and group.
    """
    packed = pack(targets)
    if dn_meta is None:
        return packed, None
    positives, groups = dn_meta["dn_positive_idx"], dn_meta["dn_num_group"]
    if isinstance(positives, Tensor):
        check_shapes(
            "dn_meta",
            labels=(packed.labels, ("B", "T")),
            dn_positive_idx=(positives, ("B", "groups", "T")),
        )
        return packed, dict(dn_meta)
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in positives]
    if len(shapes) != len(packed.labels) or not all(len(shape) == 1 for shape in shapes):
        raise ValueError(
            f"dn_positive_idx must have a tensor (n * groups,) for each of {len(packed.labels)} "
            f"images, got {shapes}"
        )
    counts = [len(p) // max(groups, 1) for p in positives]
    if not isinstance(targets, Targets):
        check_positives(positives, [len(t["labels"]) for t in targets], groups)
    device = packed.labels.device
    rows = [count for count in counts for _ in range(groups)]
    index = padded_index(rows, packed.labels.shape[1], device)
    queries = joined([p.to(device) for p in positives], index, -1)
    queries = queries.view(len(counts), groups, packed.labels.shape[1])
    return packed, {**dn_meta, "dn_positive_idx": queries}


def check_positives(positives: Sequence[Tensor], counts: Sequence[int], groups: int) -> None:
    """Raise ValueError unless every image has one denoising positive per box and group."""
    for image, (positive, count) in enumerate(zip(positives, counts, strict=True)):
        if len(positive) != count * groups:
            raise ValueError(
                f"dn_positive_idx[{image}] must have {count} boxes x {groups} groups = "
                f"{count * groups} entries, got {len(positive)}"
            )


def denoising_map(dn_meta: Mapping[str, Any], n_queries: int) -> Tensor:
    """(1, B, Q) target of each denoising query."""
    queries = dn_meta["dn_positive_idx"]
    n_images, _, n_targets = queries.shape
    target = torch.arange(n_targets, device=queries.device).expand_as(queries)
    out = target.new_full((n_images, n_queries + 1), -1)
    is_query = (queries >= 0) & (queries < n_queries)
    index = torch.where(is_query, queries, n_queries).long()
    return out.scatter(1, index.flatten(1), target.flatten(1))[:, :n_queries].unsqueeze(0)


def get_cdn_matched_indices(
    dn_meta: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """The given pairs of denoising queries: per image (query indices, target indices).

    Raises:
        ValueError: if an image's positives are not one per box and group.
    """
    positives, groups = dn_meta["dn_positive_idx"], dn_meta["dn_num_group"]
    check_positives(positives, [len(t["labels"]) for t in targets], groups)
    return [
        (positive, torch.arange(len(t["labels"]), device=t["labels"].device).repeat(groups))
        for positive, t in zip(positives, targets, strict=True)
    ]


class SetCriterion(nn.Module):
    """A criterion over matched layers: its hyperparameters, its matcher, its packing.

    Memory beyond the gradients: the costs, float32 of layers * B * T * Q, with T the largest number
    of boxes in an image, and on the torch backend three copies of them for the host.
    """

    get_cdn_matched_indices = staticmethod(get_cdn_matched_indices)
    # What is read of each layer's output, where it is there.
    entries: tuple[str, ...] = ("pred_logits", "pred_boxes")
    # A method that the class overrides and `forward` does not call.
    _in_vain = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass whose losses would be ignored.

        Raises:
            TypeError: for an overridden method that `forward` does not call, where the class has no
                `forward` of its own.
        """
        super().__init_subclass__(**kwargs)
        cls._in_vain = next((name for name in _PER_LAYER if _is_overridden(cls, name)), "")
        if not _is_overridden(cls, "forward"):
            cls._refuse_overrides()

    def __init__(
        self,
        weight_dict: dict[str, int | float],
        alpha: float = 0.2,
        gamma: float = 2.0,
        num_classes: int = 80,
    ) -> None:
        super().__init__()
        self.weight_dict = weight_dict
        self.matcher = HungarianMatcher(MATCHING_COSTS)
        self.alpha = alpha
        self.gamma = gamma
        self.num_classes = num_classes

    def prepare(
        self,
        targets: Targets | Sequence[Mapping[str, Tensor]],
        dn_meta: Mapping[str, Any] | None = None,
    ) -> tuple[Targets, dict[str, Any] | None]:
        """Targets and dn_meta as `forward` packs them: call it outside a compiled region."""
        return prepare(targets, dn_meta)

    @classmethod
    def _refuse_overrides(cls) -> None:
        if cls._in_vain:
            raise TypeError(
                f"{cls.__name__} overrides {cls._in_vain}, which forward does not call: it "
                "computes all layers at once; override forward, or scale the losses it returns"
            )

    def _check_parts(self) -> None:
        """Raise TypeError for an overridden method, or a matcher, that would not be called."""
        self._refuse_overrides()
        kind = type(self.matcher)
        if not issubclass(kind, HungarianMatcher):
            raise TypeError(
                "matcher must be a HungarianMatcher, of which `match` is called for all layers at "
                f"once, got {kind.__name__}"
            )
        overrides_forward = kind.forward is not HungarianMatcher.forward
        if overrides_forward and kind.match is HungarianMatcher.match:
            raise TypeError(
                f"matcher {kind.__name__} overrides forward, which is not called: override `match`"
            )

    def _widths(self, output: Output) -> dict[str, int | str]:
        """What a layer's output must hold, and the last dimension of each."""
        return {"pred_logits": self.num_classes, "pred_boxes": 4}

    def _check_shapes(self, main: NamedLayers, denoising: NamedLayers = ()) -> None:
        """Check that all layers are of the same images and classes; of a kind, of as many queries.

        Raises:
            TypeError, ValueError: for a missing entry or a wrong shape; they name layer and entry.
        """
        arguments = {}
        for n_queries, layers in (("Q", main), ("denoising Q", denoising)):
            for suffix, output in layers:
                for key, width in self._widths(output).items():
                    if not isinstance(output.get(key), Tensor):
                        raise ValueError(f"outputs{suffix} must have a tensor {key!r}")
                    arguments[f"outputs{suffix} {key}"] = output[key], ("B", n_queries, width)
                shape = output["pred_logits"].shape
                if shape[-1:] != (self.num_classes,):
                    raise ValueError(
                        f"outputs{suffix} pred_logits must have shape (B, {n_queries}, "
                        f"num_classes) with num_classes = {self.num_classes}, got {tuple(shape)}"
                    )
        check_shapes(type(self).__name__, **arguments)

    def _check_values(
        self,
        layers: NamedLayers,
        denoising: NamedLayers,
        targets: Targets,
        dn_meta: Mapping[str, Any] | None,
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
        arguments = {f"targets[{name!r}]": values for name, values in arguments.items()}
        for key in self.entries:
            tensors = {
                f"layer {suffix.strip('_') or 'last'}": output[key]
                for suffix, output in (*layers, *denoising)
                if output.get(key) is not None
            }
            arguments[key] = FINITE(tensors)
        if denoising and dn_meta is not None:
            n_queries = denoising[0][1]["pred_logits"].shape[1]
            rule = a_query_per_box(n_queries, targets.counts)
            arguments["dn_positive_idx"] = rule(dn_meta["dn_positive_idx"])
        if num_boxes is not None:
            arguments["num_boxes"] = NOT_NEGATIVE(num_boxes)
        check(self, **arguments)

    def _given(
        self,
        outputs: Output,
        targets: Sequence[Mapping[str, Tensor]],
        indices: Indices,
        num_boxes: float | Tensor,
    ) -> tuple[Layers, Matched, Tensor]:
        """One layer, matched by (query indices, target indices) per image, and its normaliser."""
        packed, _ = prepare(targets, None)
        self._check_shapes([("", outputs)])
        layers = stack_layers([("", outputs)])
        found = matched_targets(map_of_indices(indices, layers.logits.shape[2]), packed)
        norm = as_norm(num_boxes, layers.logits.device)
        return layers, found, norm


def _is_overridden(cls: type, name: str) -> bool:
    """Whether more than one class, `nn.Module` aside, defines a method."""
    return sum(name in vars(c) for c in cls.__mro__ if c is not nn.Module) > 1
