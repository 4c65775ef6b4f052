"""All terms of queries over layers: classes and boxes, and D-FINE's distributions of box sides.

Which target a query has, a map says: (1 or L, B, Q), -1 for none. Predictions are never gathered,
gradients never scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detloss_triton import backend
from detloss_triton.backend import kernels
from detloss_triton.boxes import cxcywh_to_xyxy, ltrb
from detloss_triton.engine import (
    DIVISOR,
    NOTHING,
    OWN_SUM,
    SECOND,
    TILE,
    Gradients,
    Plan,
    Sample,
    Tensors,
    direct,
    fused_op,
    power_of_2,
    strided,
)
from detloss_triton.engine.calls import FusedCall, call_of
from detloss_triton.precision import arithmetic_dtype, at_least_float32

from .classification import (
    LEAST_TARGET,
    binary_cross_entropy,
    iou_aware,
    matchability,
    sigmoid_focal,
    varifocal,
)
from .distribution import MAX_BINS, distillation, rows_and_warps, two_bin
from .matching import are_of_one_layout, of_one_layout
from .regression import GIOU_EPS, UNION_EPS, giou_loss, iou_loss, l1

# The distillation's means weigh as the square roots of their sizes, counted per batch of 8.
_REFERENCE_BATCH = 8
# Added to a reference box's size, in reg_scales.
_SIZE_EPS = 1e-16
# Queries that a program counts at a time.
_COUNTED = 4096


@dataclass(frozen=True)
class Matched:
    """Each query's target, read off a map.

    Shapes:
        matched: (L, B, Q) bool. labels: (L, B, Q), -1 for none. boxes: (L, B, Q, 4) normalised
        cxcywh, 0 for none.
    """

    matched: Tensor
    labels: Tensor
    boxes: Tensor


def matched_targets(matches: Tensor, labels: Tensor, targets: Tensor) -> Matched:
    """Look the targets of a map (L, B, Q) up; one that does not exist is none."""
    matched = _is_match(matches, labels.shape[1])
    n_layers = len(matches)
    index = matches.masked_fill(~matched, 0).long()
    found = labels.expand(n_layers, -1, -1).gather(2, index)
    boxes = targets.expand(n_layers, -1, -1, -1)
    boxes = boxes.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 4))
    return Matched(
        matched, found.masked_fill(~matched, -1), boxes.masked_fill(~matched.unsqueeze(-1), 0)
    )


def _is_match(matches: Tensor, n_targets: int) -> Tensor:
    return (matches >= 0) & (matches < n_targets)


def iou_of(boxes: Tensor, found: Matched) -> Tensor:
    """(L, B, Q): IoU of each query's box with its target, 0 without one; no gradient."""
    with torch.no_grad():
        pairs = cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(found.boxes).expand_as(boxes)
        missed = iou_loss(*pairs, mode="linear", eps=0.0, keep=3)
        return (1 - missed).masked_fill(~found.matched, 0)


@dataclass
class _Layered(Plan):
    """Of layers that one body of code takes: copied where they are not of one layout."""

    # Numbers of the inputs that are to be copied, once known.
    copied: list[int] | None = None

    def _launch(
        self,
        call: FusedCall,
        tensors: Tensors,
        gradients: Gradients,
        **pointers: Any,
    ) -> None:
        inputs, into = call.inputs(tensors), call.inputs(gradients)
        if self.copied is None:
            layers = [(i, inputs[i]) for i in call.op.of_levels if inputs[i]]
            self.copied = [i for i, given in layers if not are_of_one_layout(given)]
        for i in self.copied:
            inputs[i] = tuple(of_one_layout(inputs[i]))
        apart = [i for i in call.op.of_gradients if not _may_be_written(into[i])]
        wanted = [*into]
        for i in apart:
            first = inputs[i][0]
            into[i] = first.new_empty((len(inputs[i]), *first.shape)).unbind()
        if self.copied:
            call, tensors = call_of(call.op, inputs, call.params)
        super()._launch(call, tensors, [x for xs in into for x in xs], **pointers)
        for i in apart:
            for x, y in zip(wanted[i], into[i], strict=True):
                if x is not None:
                    x.copy_(y)


def _may_be_written(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a kernel writes to these gradients of layers: to those of all, or of none."""
    there = [x for x in gradients if x is not None]
    return not there or (len(there) == len(gradients) and are_of_one_layout(there))


def _some_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    centre = torch.rand(*shape, 2, generator=generator)
    return torch.cat([centre, 0.05 + torch.rand(*shape, 2, generator=generator) * 0.4], -1)


def _some_matches(generator: torch.Generator, n_targets: int, *shape: int) -> Tensor:
    """Matches, and what is none."""
    return torch.randint(-2, n_targets + 2, shape, generator=generator)


def _queries_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_layers, n_targets = 2, 3, 5
    for n_classes, losses, classes, by_union, gamma, boxes_weight in (
        (7, "loss_giou loss_bbox loss_vfl", "varifocal", False, 2.0, "none"),
        (20, "loss_vfl loss_bbox loss_giou", "varifocal", True, 1.5, "none"),
        (1, "loss_bbox", "varifocal", True, 2.0, "none"),
        (3, "loss_vfl", "varifocal", False, 2.0, "giou"),
        (20, "loss_bbox loss_ce", "softmax", True, 2.0, "none"),
        (3, "loss_mal loss_giou", "matchability", False, 1.5, "iou"),
        (20, "loss_ce", "iou_aware", True, 2.0, "giou"),
        (3, "loss_focal loss_giou", "focal", False, 2.0, "giou"),
        (3, "loss_bce", "bce", False, 2.0, "none"),
    ):
        # Of two numbers the second is that of the union's pairs.
        divisor = torch.tensor([6.5, 4.5]) if "ce" in losses else torch.tensor(6.5)
        each = [
            (
                torch.randn(n_images, rows, n_classes, generator=generator) * 3,
                _some_boxes(generator, n_images, rows),
            )
            for _ in range(n_layers)
        ]
        logits, boxes = zip(*each, strict=True)
        yield Sample(
            (
                logits,
                boxes,
                (_some_matches(generator, n_targets, n_layers, n_images, rows),),
                (_some_matches(generator, n_targets, 1, n_images, rows),) if by_union else (),
                (torch.randint(-1, n_classes + 1, (n_images, n_targets), generator=generator),),
                (_some_boxes(generator, n_images, n_targets),),
                (divisor,),
            ),
            {
                "alpha": 0.75,
                "gamma": gamma,
                "losses": losses,
                "classes": classes,
                "boxes_weight": boxes_weight,
                "factors": (1.0, 2.5, 0.5)[: len(losses.split())],
                "added": 0.25,
            },
        )


@fused_op(
    levels=("logits", "boxes"),
    gradients=("logits", "boxes"),
    samples=_queries_samples,
    is_of_layers=True,
)
def queries(
    logits: tuple[Tensor, ...],
    boxes: tuple[Tensor, ...],
    matches: tuple[Tensor, ...],
    union: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    divisor: tuple[Tensor, ...],
    alpha: float,
    gamma: float,
    losses: str,
    classes: str,
    boxes_weight: str,
    factors: tuple[float, ...],
    added: float,
) -> Tensor:
    """(losses * L,) of each of the `losses` that of every layer, summed and divided.

    "loss_bbox" is L1 and "loss_giou" GIoU, each of pairs. One of another name is of `classes`:
    "varifocal", "matchability" and "iou_aware" with the IoU of a pair as its score; "focal";
    "bce"; or "softmax", of which the last class is that of queries without an object. These weigh
    alpha, and it is the weighted mean. A boxes_weight "iou" or "giou" weighs the GIoU losses with
    that of each pair, without a gradient, and is the score of the first two.

    Shapes:
        logits: L of (B, Q, C). boxes: L of (B, Q, 4) cxcywh. matches: one map. union: one map of
        the pairs whose boxes are compared, which their number divides, or the second of two
        divisors; or those of `matches`, divided by the divisor and what is added. labels: one
        (B, T); one that is no class is background. targets: one (B, T, 4) cxcywh. divisor: one of
        () or (2,).
    """
    # Gradients of several terms are added in float32.
    stacked, names = at_least_float32(torch.stack(tuple(boxes))), losses.split()
    found = matched_targets(matches[0], labels[0], targets[0])
    values, norms = {}, divisor[0].view(-1)
    of_classes = class_loss(losses)
    if of_classes:
        scores = torch.stack(tuple(logits))
        label = found.labels.expand(scores.shape[:-1])
        by = boxes_weight if classes in _SCORED_BY_CHOICE else "none"
        score = pair_weight(stacked, found, by) if classes in _SCORED else None
        if classes == "softmax":
            values[of_classes] = _softmax(scores, label, alpha)
        elif classes == "bce":
            each = binary_cross_entropy(scores, label, None, None, keep=1)
            values[of_classes] = each / norms[0]
        else:
            op = _SCORED.get(classes, sigmoid_focal)
            each = op(scores, label, score, None, keep=1, alpha=alpha, gamma=gamma)
            values[of_classes] = each / norms[0]
    norm = norms[0] + added if added else norms[0]
    if union:
        found = matched_targets(union[0], labels[0], targets[0])
        norm = norms[1] if len(norms) > 1 else found.matched.sum().clamp(min=1)
    if names != [of_classes]:
        distance, overlap = _box_losses(stacked, found, boxes_weight)
        values["loss_bbox"], values["loss_giou"] = distance / norm, overlap / norm
    return torch.cat([values[x] * factor for x, factor in zip(names, factors, strict=True)])


# The losses of classes whose score is the IoU.
_SCORED = {"varifocal": varifocal, "matchability": matchability, "iou_aware": iou_aware}


# Those of them whose score `boxes_weight` chooses.
_SCORED_BY_CHOICE = ("varifocal", "matchability")


def class_loss(losses: str) -> str:
    """The one that is of classes among some losses' names; empty without one."""
    return [*(x for x in losses.split() if x not in ("loss_bbox", "loss_giou")), ""][0]


def _softmax(scores: Tensor, label: Tensor, of_nothing: float) -> Tensor:
    """(L,): cross-entropy, the mean weighted with `of_nothing` where there is no object."""
    last = scores.shape[-1] - 1
    is_object = (label >= 0) & (label < last)
    weight = is_object.to(torch.float32).masked_fill(~is_object, of_nothing)
    label = label.masked_fill(~is_object, last)
    total = two_bin(scores, label, None, None, weight=weight, keep=1)
    norm = weight.sum((1, 2))
    return total / torch.where(norm > 0, norm, 1)


def pair_weight(boxes: Tensor, found: Matched, by: str) -> Tensor:
    """(L, B, Q): what weighs each pair: its GIoU if by "giou", else its IoU; 0 without a target."""
    if by != "giou":
        return iou_of(boxes, found)
    boxes = boxes.detach().masked_fill(~found.matched.unsqueeze(-1), 0)
    pairs = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(found.boxes).expand_as(boxes)
    return (1 - giou_loss(*pairs, eps=GIOU_EPS, keep=3)).masked_fill(~found.matched, 0)


def _box_losses(boxes: Tensor, found: Matched, boxes_weight: str) -> tuple[Tensor, Tensor]:
    """(L,), (L,): L1 and GIoU losses of the matched queries, summed."""
    of_overlap = None if boxes_weight == "none" else pair_weight(boxes, found, boxes_weight)
    weight = found.matched.to(torch.float32).expand(boxes.shape[:-1])
    target = found.boxes.expand(boxes.shape)
    # A query without a target is blanked: whatever its box holds, its gradient is 0.
    boxes = boxes.masked_fill(~found.matched.unsqueeze(-1), 0)
    distance = l1(boxes, target, weight=weight, keep=1)
    pairs = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target)
    weight = weight if of_overlap is None else of_overlap
    return distance, giou_loss(*pairs, weight=weight, keep=1, eps=GIOU_EPS)


@queries.triton
def _(given: Any) -> Plan:
    n_images, n_queries, n_classes = given.logits[0].shape
    columns = min(power_of_2(n_classes), 16)
    rows = TILE // columns
    names = given.losses.split()
    of_classes = class_loss(given.losses)
    by_weight = given.classes == "softmax" and bool(of_classes)
    counts = bool(given.union) and given.divisor[0].numel() == 1
    by_count = (OWN_SUM, len(names)) if counts else (DIVISOR, float(given.added))
    if given.union and not counts:
        by_count = (SECOND, 0.0)
    n_sums = len(names) + counts + by_weight
    mean = (OWN_SUM, n_sums - 1) if by_weight else (DIVISOR, 0.0)
    divided = {of_classes: mean, "loss_bbox": by_count, "loss_giou": by_count}
    row_of = [names.index(name) if name in names else -1 for name in divided]
    return _Layered(
        kernels.queries.queries_kernel,
        terms=tuple((float(f), *divided[x]) for x, f in zip(names, given.factors, strict=True)),
        n_sums=n_sums,
        blocks=(-(-n_queries // rows),),
        n_repeats=n_images,
        n_segments=len(given.logits),
        divisor=given.divisor[0],
        arguments={
            "matches": _map(given.matches[0]),
            "union": _map(given.union[0]) if given.union else None,
            "labels": strided(given.labels[0], 1),
            "targets": strided(given.targets[0], 1),
            "s_labels": given.labels[0].stride(0),
            "s_targets": given.targets[0].stride(0),
            "n_queries": n_queries,
            "n_targets": given.labels[0].shape[1],
            "n_classes": n_classes,
            "CLASSES": (given.classes, float(given.alpha), float(given.gamma), LEAST_TARGET),
            "TERMS": (
                *row_of,
                len(names) if counts else -1,
                n_sums - 1 if by_weight else -1,
                len(given.logits),
            ),
            "BOXES": (
                UNION_EPS,
                GIOU_EPS,
                given.boxes_weight != "none",
                given.boxes_weight == "giou",
                given.boxes_weight == "giou" and given.classes in _SCORED_BY_CHOICE,
            ),
            "BR": rows,
            "BC": columns,
        },
    )


def _map(matches: Tensor) -> tuple[Any, ...]:
    """With the strides of layer, image and query: one map may serve all layers."""
    layer, image, query = matches.stride()
    return matches, 0 if len(matches) == 1 else layer, image, query


def _shares_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    like, params = torch.tensor(1.0), {"n_targets": 4}
    union = _some_matches(generator, 4, 1, 2, rows)
    own = _some_matches(generator, 4, 1, 2, 2 * rows)
    yield Sample((own, union, like), params)
    yield Sample((union, union, like), params)
    yield Sample((torch.full_like(own, -1), torch.full_like(union, -1), like), params)


@direct(samples=_shares_samples)
def distillation_shares(own: Tensor, union: Tensor, like: Tensor, n_targets: int) -> Tensor:
    """(2,) factors of matched and of other sides, so that a sum is the balanced sum of two means.

    The means weigh a and b over a + b, a and b the square roots of the numbers of matched and other
    sides in the `union`.

    Shapes:
        own, union: (1, B, Q) maps, the first of the queries that are to be weighed. like: of the
        type to compute in.
    """
    dtype = arithmetic_dtype(like)
    n_images = union.shape[1]
    roots = (_sides(union, n_targets, dtype) * (_REFERENCE_BATCH / n_images)).sqrt()
    return roots / roots.sum().clamp(min=1) / _sides(own, n_targets, dtype).clamp(min=1)


def _sides(matches: Tensor, n_targets: int, dtype: torch.dtype) -> Tensor:
    """(2,) numbers of sides that are matched, and that are not."""
    n_matched = 4.0 * _is_match(matches, n_targets).sum().to(dtype)
    return torch.stack([n_matched, 4.0 * matches.numel() - n_matched])


@distillation_shares.triton
def _(given: Any) -> Tensor:
    out = torch.empty(2, dtype=torch.float32, device=given.own.device)
    backend.launch(
        kernels.queries.shares_kernel,
        (1,),
        given.own.device,
        p_own=given.own.contiguous(),
        p_union=given.union.contiguous(),
        p_out=out,
        n_own=given.own.numel(),
        n_union=given.union.numel(),
        n_targets=given.n_targets,
        BLOCK=min(power_of_2(max(given.own.numel(), given.union.numel())), _COUNTED),
    )
    return out


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


def _localisation_samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
    n_images, n_targets, n_classes = 2, 5, 9
    rows = min(rows, 6)  # of four sides each: several programs
    for reg_max, losses, n_layers, n_taught, by_union in (
        (32, "loss_fgl loss_ddf", 3, 2, True),
        (8, "loss_fgl loss_ddf", 2, 2, False),
        (16, "loss_fgl", 2, 0, False),
        (4, "loss_ddf loss_fgl", 1, 1, True),
    ):
        shape = (n_images, rows)
        each = [
            (
                torch.randn(*shape, 4 * (reg_max + 1), generator=generator) * 2,
                torch.randn(*shape, 4 * (reg_max + 1), generator=generator) * 2,
                torch.randn(*shape, n_classes, generator=generator) - 1,
                _some_boxes(generator, *shape),
                _some_boxes(generator, *shape),
            )
            for _ in range(n_layers)
        ]
        corners, teachers, scores, points, boxes = zip(*each, strict=True)
        # By their number a map is of all layers.
        n_maps = n_layers if losses == "loss_fgl" else 1
        matches = _some_matches(generator, n_targets, n_maps, *shape)
        yield Sample(
            (
                corners,
                points,
                boxes,
                # One teacher of all layers.
                (teachers[0],) * n_layers if n_taught else (),
                (scores[0],) * n_layers if n_taught else (),
                (matches,),
                (_some_boxes(generator, n_images, n_targets),),
                (torch.tensor([0.002, 0.001]),) if n_taught else (),
                (torch.tensor(0.5), torch.tensor(4.0)),
                (torch.tensor([6.5, 3.5]) if n_layers == 1 else torch.tensor(6.5),),
            ),
            {
                "n_taught": n_taught,
                "losses": losses,
                "factors": (0.15, 1.5)[: len(losses.split())],
                "by_count": by_union,
                "temperature": 5.0,
            },
        )


@fused_op(
    levels=("corners", "points", "boxes", "teachers", "scores"),
    gradients=("corners",),
    samples=_localisation_samples,
    is_of_layers=True,
)
def localisation(
    corners: tuple[Tensor, ...],
    points: tuple[Tensor, ...],
    boxes: tuple[Tensor, ...],
    teachers: tuple[Tensor, ...],
    scores: tuple[Tensor, ...],
    matches: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    shares: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    divisor: tuple[Tensor, ...],
    n_taught: int,
    losses: str,
    factors: tuple[float, ...],
    by_count: bool,
    temperature: float,
) -> Tensor:
    """(losses * L,) of each of the `losses` that of every layer: D-FINE's of distributions.

    "loss_fgl" is the cross-entropy with the two bins around the target of a matched side, weighted
    with the IoU of the boxes; divided by the divisor, or `by_count` of the matched queries, or by
    the second of two divisors.
    "loss_ddf" is the divergence from the teacher of the first `n_taught` layers, weighted with that
    IoU or, of other queries, the teacher's confidence, and the shares; 0 for the other layers.

    Shapes:
        corners: L of (B, Q, 4 (R + 1)). points: L of (B, Q, 4) reference boxes cxcywh. boxes: L of
        (B, Q, 4) cxcywh, which have no gradient. teachers: none, or L as the corners, one of which
        may be several layers'; those of layers without one are not read. scores: the teachers'
        logits, L of (B, Q, any). matches: one (1 or L, B, Q). targets: one (B, T, 4) cxcywh.
        shares: of matched and other sides, one of (2,), or none. scales: up and reg_scale, () each.
        divisor: one of () or (2,).
    """
    n_sides = (4, corners[0].shape[-1] // 4)
    scales = tuple(map(at_least_float32, scales))
    labels = matches[0].new_empty(1, 1).expand(targets[0].shape[:2])
    found = matched_targets(matches[0], labels, targets[0])
    iou = iou_of(torch.stack(tuple(boxes)), found)
    student = at_least_float32(torch.stack(tuple(corners))).unflatten(-1, n_sides)
    out = []
    for name, factor in zip(losses.split(), factors, strict=True):
        if name == "loss_fgl":
            norms = divisor[0].view(-1)
            positions = bin_positions(n_sides[1] - 1, *scales)
            left, right = box_bins(stacked(points), found.boxes, positions, scales[1])
            weight = (iou * found.matched).unsqueeze(-1).expand(left.shape)
            value = two_bin(student, left, 1 - right, right, weight=weight, keep=1)
            norm = norms[0]
            if by_count:
                norm = norms[1] if len(norms) > 1 else found.matched.sum().clamp(min=1)
            out.append(value / norm * factor)
        else:
            taught = student[:n_taught]
            teacher = stacked(teachers[:n_taught]).unflatten(-1, n_sides)
            confidence = stacked(scores[:n_taught]).amax(-1).to(iou.dtype).sigmoid()
            matched = found.matched.expand(iou.shape)[:n_taught]
            of_matched, of_others = shares[0].unbind()
            weight = torch.where(matched, iou[:n_taught], confidence)
            weight = weight * torch.where(matched, of_matched, of_others)
            value = distillation(
                taught,
                teacher.expand(taught.shape),
                weight=weight.unsqueeze(-1).expand(taught.shape[:-1]).contiguous(),
                keep=1,
                temperature=temperature,
            )
            out += [value * factor, value.new_zeros(len(corners) - n_taught)]
    return torch.cat(out)


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """Layers as one tensor; one that all share is not copied."""
    if all(x is layers[0] for x in layers):
        return layers[0].expand(len(layers), *layers[0].shape)
    return torch.stack(tuple(layers))


@localisation.triton
def _(given: Any) -> Plan:
    n_images, n_queries, n_logits = given.corners[0].shape
    n_bins = n_logits // 4
    rows, warps = rows_and_warps(n_bins)
    names = given.losses.split()
    counts = given.by_count and given.divisor[0].numel() == 1
    of_count = (OWN_SUM, len(names)) if counts else (SECOND if given.by_count else DIVISOR, 0.0)
    divided = {"loss_fgl": of_count, "loss_ddf": (NOTHING, 0.0)}
    row_of = [names.index(name) if name in names else -1 for name in divided]
    shares = (given.shares[0], given.shares[0].stride(0)) if given.shares else None
    return _Layered(
        kernels.queries.localisation_kernel,
        terms=tuple((float(f), *divided[x]) for x, f in zip(names, given.factors, strict=True)),
        n_sums=len(names) + counts,
        blocks=(-(-4 * n_queries // rows),),
        n_repeats=n_images,
        n_segments=len(given.corners),
        divisor=given.divisor[0],
        arguments={
            "matches": _map(given.matches[0]),
            "targets": strided(given.targets[0], 1),
            "constants": (*given.scales, shares),
            "s_targets": given.targets[0].stride(0),
            "n_queries": n_queries,
            "n_targets": given.targets[0].shape[1],
            "n_bins": n_bins,
            "n_scores": given.scores[0].shape[-1] if given.scores else 0,
            "n_taught": given.n_taught,
            "TERMS": (*row_of, len(names) if counts else -1, len(given.corners)),
            "TEMPERATURE": float(given.temperature),
            "EPS": (UNION_EPS, _SIZE_EPS),
            "BR": rows,
            "BK": power_of_2(n_bins),
            "num_warps": warps,
        },
    )


@localisation.limited
def _(corners: Tensor, *others: Tensor) -> str:
    bins = corners.shape[-1] // 4
    return f"pred_corners may have up to {MAX_BINS} bins, got {bins}" if bins > MAX_BINS else ""
