"""What RT-DETR's and D-FINE's criteria are called with: taken as by OTX, or refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_detr import (
    CLASSES,
    CPU,
    DETR_WEIGHTS,
    DFINE_WEIGHTS,
    EXTRAS,
    GROUPS,
    QUERIES,
    Inputs,
    criterion_of,
)
from torch import Tensor, nn
from trees import Unchanged

import detloss_triton as dt
from detloss_triton import DetrCriterion, DFINECriterion, HungarianMatcher, validation

NAMES = ("detr", "dfine")
CRITERIA: dict[str, Any] = {"detr": DetrCriterion, "dfine": DFINECriterion}
WEIGHTS = {"detr": DETR_WEIGHTS, "dfine": DFINE_WEIGHTS}
COSTS: dict[str, float | int] = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
ALL_COUNTS = ([2, 3], [0, 3], [3, 0, 1])

over_criteria = pytest.mark.parametrize("name", NAMES)
Change = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def arguments_of(name: str, counts: list[int] | None = None) -> tuple[dict[str, Any], Any]:
    """Outputs with every kind of layer, and targets."""
    inputs = Inputs([2, 3] if counts is None else counts, CPU, torch.float32)
    return getattr(inputs, name)(*EXTRAS), inputs.targets


def step(criterion: nn.Module, outputs: Any, targets: Any, **more: Any) -> dict[str, Tensor]:
    """Losses after a step that writes nothing but gradients, and leaves none missing."""
    with Unchanged({"outputs": outputs, "targets": targets}):
        losses = criterion(outputs, targets, **more)
        dt.sum_losses(losses).backward()
    return losses


def assert_equal(losses: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert losses.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss, rtol=1e-6, atol=1e-7, msg=key)


def denoising_of(name: str) -> str:
    return "dn_aux_outputs" if name == "detr" else "dn_outputs"


# Dtypes, shapes and devices of what holds nothing.


NOTHING = {
    "floats": torch.tensor([]),
    "a row": torch.tensor([[]]),
    "five columns": torch.zeros(0, 5),
    "integers": torch.zeros(0, 4, dtype=torch.int64),
    "flags": torch.zeros(0, dtype=torch.bool),
    "halves": torch.zeros(0, 4, dtype=torch.float16),
    "doubles": torch.zeros(0, 4, dtype=torch.float64),
    "elsewhere": torch.zeros(0, 4, device="meta"),
}


@over_criteria
@pytest.mark.parametrize("counts", [[0, 3], [3, 0, 1]], ids=str)
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING.keys())
@pytest.mark.parametrize("entry", ["labels", "boxes", "dn_positive_idx", "all"])
def test_what_holds_nothing_may_be_of_any_kind(
    name: str, counts: list[int], nothing: Tensor, entry: str
) -> None:
    outputs, targets = arguments_of(name, counts)
    expected = criterion_of(name)(outputs, targets)
    empty = counts.index(0)
    if entry in ("dn_positive_idx", "all"):
        outputs["dn_meta"]["dn_positive_idx"][empty] = nothing
    for key in ("labels", "boxes"):
        if entry in (key, "all"):
            targets[empty] = {**targets[empty], key: nothing}
    assert_equal(step(criterion_of(name), outputs, targets), expected)
    packed, dn_meta = criterion_of(name).prepare(targets, outputs["dn_meta"])
    assert packed.boxes.dtype == torch.float32 and packed.labels.dtype == torch.int64
    assert_equal(criterion_of(name)({**outputs, "dn_meta": dn_meta}, packed), expected)


@over_criteria
def test_a_batch_of_nothing_may_be_of_any_kind(name: str) -> None:
    inputs = Inputs([0, 0], CPU, torch.float32)
    outputs = getattr(inputs, name)("aux")
    expected = criterion_of(name)(outputs, inputs.targets)
    for nothing in NOTHING.values():
        targets = [{"labels": nothing, "boxes": nothing}] * 2
        assert_equal(step(criterion_of(name), outputs, targets), expected)


@over_criteria
def test_targets_may_be_of_any_number_type(name: str) -> None:
    outputs, targets = arguments_of(name)
    for target in targets:
        target["labels"] = target["labels"].clamp(max=1)
    expected = criterion_of(name)(outputs, targets)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool):
        cast = [{**target, "labels": target["labels"].to(dtype)} for target in targets]
        assert_equal(step(criterion_of(name), outputs, cast), expected)
    doubles = [{**target, "boxes": target["boxes"].double()} for target in targets]
    assert_equal(step(criterion_of(name), outputs, doubles), expected)

    whole = [{**target, "boxes": target["boxes"].round()} for target in targets]
    expected = criterion_of(name)(outputs, whole)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        cast = [{**target, "boxes": target["boxes"].to(dtype)} for target in whole]
        assert_equal(step(criterion_of(name), outputs, cast), expected)
        packed = dt.Targets(*criterion_of(name).prepare(whole)[0])
        packed = packed._replace(boxes=packed.boxes.to(dtype))
        assert_equal(step(criterion_of(name), outputs, packed), expected)


@over_criteria
def test_denoising_positives_may_be_rows_of_a_tensor(name: str) -> None:
    """As OTX takes them, and integers of any kind."""
    outputs, targets = arguments_of(name, [3, 3])
    expected = criterion_of(name)(outputs, targets)
    meta = outputs["dn_meta"]
    rows = torch.stack(meta["dn_positive_idx"])
    groups = (GROUPS, np.int64(GROUPS), torch.tensor(GROUPS), torch.tensor([GROUPS]))
    for given in (rows, rows.int(), rows.byte(), tuple(rows), list(rows.short())):
        for group in groups:
            outputs["dn_meta"] = {"dn_positive_idx": given, "dn_num_group": group}
            assert_equal(criterion_of(name)(outputs, targets), expected)


@over_criteria
@pytest.mark.parametrize("packed", [False, True], ids=["listed", "packed"])
def test_targets_that_require_a_gradient_get_none(name: str, packed: bool) -> None:
    outputs, targets = arguments_of(name)
    expected = criterion_of(name)(outputs, targets)
    boxes = [target["boxes"].requires_grad_() for target in targets]
    outputs["dn_meta"] = {**outputs["dn_meta"]}
    given: Any = targets
    if packed:
        given, outputs["dn_meta"] = criterion_of(name).prepare(targets, outputs["dn_meta"])
        boxes.append(given.boxes)
        given = given._replace(boxes=given.boxes.detach().requires_grad_())
        boxes.append(given.boxes)
    num_boxes = torch.tensor(5.0, requires_grad=True)
    assert_equal(step(criterion_of(name), outputs, given, num_boxes=num_boxes), expected)
    assert all(x.grad is None for x in (*boxes, num_boxes))
    pairs = criterion_of(name).matcher(outputs, given)
    losses = criterion_of(name).loss_boxes(outputs, given, pairs, num_boxes)
    assert losses["loss_bbox"].requires_grad


def test_numbers_of_the_bins_may_be_plain() -> None:
    outputs, targets = arguments_of("dfine")
    expected = criterion_of("dfine")(outputs, targets)
    for up in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([[0.5]])):
        for reg_scale in (4, 4.0, np.int64(4), torch.tensor([4])):
            given = {**outputs, "up": up, "reg_scale": reg_scale}
            assert_equal(criterion_of("dfine")(given, targets), expected)
            with validation(True):
                criterion_of("dfine")(given, targets)


@over_criteria
def test_num_boxes_is_any_one_number(name: str) -> None:
    outputs, targets = arguments_of(name)
    expected = criterion_of(name)(outputs, targets)
    for five in (5, 5.0, np.float32(5), np.int64(5), torch.tensor([5]), torch.tensor([[5.0]])):
        assert_equal(step(criterion_of(name), outputs, targets, num_boxes=five), expected)


@over_criteria
def test_dn_meta_is_read_for_denoising_layers_only(name: str) -> None:
    outputs, targets = Inputs([2, 3], CPU, torch.float32).dfine("aux"), arguments_of(name)[1]
    expected = criterion_of(name)(outputs, targets)
    for meta in ({}, {"dn_num_group": 2}, {"dn_positive_idx": None}, "anything"):
        assert_equal(criterion_of(name)({**outputs, "dn_meta": meta}, targets), expected)


# Errors.


def meta(key: str, value: Any) -> Change:
    """An entry of dn_meta replaced, or with `...` taken out."""

    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        outputs["dn_meta"] = {**outputs["dn_meta"], key: value}
        if value is ...:
            del outputs["dn_meta"][key]

    return change


def positives(function: Callable[[Tensor], Any]) -> Change:
    """The second image's positives changed."""

    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        outputs["dn_meta"]["dn_positive_idx"][1] = function(
            outputs["dn_meta"]["dn_positive_idx"][1]
        )

    return change


def target(key: str, function: Callable[[Tensor], Any] | None) -> Change:
    """An entry of the second image's target changed, or with None taken out."""

    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        targets[1] = {**targets[1]}
        value = targets[1].pop(key)
        if function is not None:
            targets[1][key] = function(value)

    return change


def output(key: str, value: Any) -> Change:
    return lambda outputs, targets: outputs.update({key: value})


def layer(key: str, function: Callable[[Tensor], Any]) -> Change:
    """An entry of the second auxiliary layer changed."""

    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        outputs["aux_outputs"][1] = {
            k: function(value) if k == key else value
            for k, value in outputs["aux_outputs"][1].items()
        }

    return change


def fewer_queries(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
    outputs["aux_outputs"][1] = {key: x[:, :-1] for key, x in outputs["aux_outputs"][1].items()}


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


FAULTS: list[tuple[Change, type[Exception], str]] = [
    (meta("dn_num_group", ...), ValueError, "dn_meta must have 'dn_num_group'"),
    (meta("dn_num_group", None), ValueError, "dn_meta must have 'dn_num_group'"),
    (meta("dn_num_group", "2"), TypeError, "dn_num_group must be an integer, got '2'"),
    (meta("dn_num_group", True), TypeError, "dn_num_group must be an integer, got True"),
    (meta("dn_num_group", 2.0), TypeError, "dn_num_group must be an integer, got 2.0"),
    (meta("dn_num_group", [2]), TypeError, "dn_num_group must be an integer, got list"),
    (meta("dn_num_group", -1), ValueError, "dn_num_group must be at least 0, got -1"),
    (meta("dn_num_group", 3), ValueError, r"dn_positive_idx\[0\] must have 2 boxes x 3 groups"),
    (meta("dn_positive_idx", ...), ValueError, "dn_meta must have 'dn_positive_idx'"),
    (meta("dn_positive_idx", None), ValueError, "dn_meta must have 'dn_positive_idx'"),
    (meta("dn_positive_idx", 7), TypeError, "dn_positive_idx must be a list of tensors.* got int"),
    (meta("dn_positive_idx", torch.tensor(7)), ValueError, "dn_positive_idx must have"),
    (meta("dn_positive_idx", torch.ones(3, 2, 2).long()), ValueError, "dn_positive_idx must have"),
    (positives(lambda x: None), ValueError, "dn_positive_idx must have a tensor"),
    (positives(lambda x: x.tolist()), ValueError, "dn_positive_idx must have a tensor"),
    (positives(lambda x: x[:, None]), ValueError, "dn_positive_idx must have a tensor"),
    (positives(lambda x: x.float()), ValueError, r"dn_positive_idx\[1\] must hold the indices"),
    (positives(lambda x: x > 0), ValueError, r"dn_positive_idx\[1\] must hold .*bool"),
    (positives(on_meta), ValueError, r"dn_positive_idx\[1\] must be on cpu, got meta"),
    (positives(lambda x: x[1:]), ValueError, r"dn_positive_idx\[1\] must have 3 boxes x 2 groups"),
    (output("dn_meta", []), TypeError, "dn_meta must be a dictionary, got list"),
    (output("dn_meta", None), ValueError, "must have 'dn_meta'"),
    (target("labels", None), ValueError, r"targets\[1\] must have a tensor 'labels'"),
    (target("boxes", None), ValueError, r"targets\[1\] must have a tensor 'boxes'"),
    (target("labels", Tensor.tolist), TypeError, r"targets\[1\]\['labels'\] must be a tensor"),
    (target("boxes", Tensor.numpy), TypeError, r"targets\[1\]\['boxes'\] must be a tensor"),
    (target("labels", Tensor.float), ValueError, r"targets\[1\]\['labels'\] must be integers"),
    (target("labels", lambda x: x[1:]), ValueError, r"targets\[1\]\['boxes'\] must have shape"),
    (target("labels", lambda x: x[:0]), ValueError, r"targets\[1\]\['boxes'\] must have shape"),
    (target("boxes", lambda x: x[:0]), ValueError, r"targets\[1\]\['boxes'\] must have shape"),
    (target("labels", on_meta), ValueError, r"targets\[1\]\['labels'\] must be on cpu, got meta"),
    (target("boxes", on_meta), ValueError, r"targets\[1\]\['boxes'\] must be on cpu, got meta"),
    (lambda outputs, targets: targets.__setitem__(1, None), TypeError,
     r"targets\[1\] must be a dictionary, got NoneType"),
    (lambda outputs, targets: targets.pop(), ValueError,
     "targets has 1 images, the predictions have 2"),
    (output("aux_outputs", {}), TypeError, r"outputs\['aux_outputs'\] must be a list .* got dict"),
    (output("aux_outputs", torch.ones(2)), TypeError, r"outputs\['aux_outputs'\] must be a list"),
    (output("aux_outputs", [None]), TypeError, "outputs_aux_0 must be a dictionary, got NoneType"),
    (output("pred_logits", [1]), TypeError, "outputs pred_logits must be a tensor, got list"),
    (output("pred_boxes", None), ValueError, "outputs must have a tensor 'pred_boxes'"),
    (layer("pred_boxes", on_meta), ValueError, "outputs_aux_1 pred_boxes must be on cpu"),
    (layer("pred_boxes", lambda x: None), ValueError, "outputs_aux_1 must have a tensor"),
    (fewer_queries, ValueError, r"outputs_aux_1 pred_logits must have shape \(B, Q, 4\)"),
]  # fmt: skip
OF_DFINE: list[tuple[Change, type[Exception], str]] = [
    (output("up", None), ValueError, "must have 'up'"),
    (output("reg_scale", None), ValueError, "must have 'reg_scale'"),
    (output("up", True), TypeError, "up must be a number, got True"),
    (output("up", "x"), TypeError, "up must be a number, got 'x'"),
    (output("up", torch.ones(2)), TypeError, r"up must be a number, got torch.float32 \(2,\)"),
    (output("reg_scale", torch.ones(1, device="meta")), ValueError, "reg_scale must be on cpu"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        *(("detr", *fault) for fault in FAULTS),
        *(("dfine", *fault) for fault in FAULTS + OF_DFINE),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_error_names_criterion_and_argument(
    name: str, change: Change, error: type[Exception], message: str
) -> None:
    outputs, targets = arguments_of(name)
    change(outputs, targets)
    with pytest.raises(error, match=f"^{CRITERIA[name].__name__}\\b[^\n]*{message}[^\n]*$"):
        criterion_of(name)(outputs, targets)


@over_criteria
@pytest.mark.parametrize(
    "num_boxes",
    [
        True,
        False,
        "4",
        [4],
        torch.ones(2),
        torch.tensor(True),
        np.array([1.0, 2.0]),
        -3,
        0,
        0.0,
        np.float64(-1),
        float("nan"),
        float("inf"),
    ],
    ids=str,
)
def test_num_boxes_of_another_kind_is_refused(name: str, num_boxes: Any) -> None:
    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    pairs = criterion.matcher(outputs, targets)
    message = f"^{type(criterion).__name__}: num_boxes must be"
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(outputs, targets, num_boxes=num_boxes)
    with pytest.raises((TypeError, ValueError), match=message):
        criterion.loss_boxes(outputs, targets, pairs, num_boxes)


@over_criteria
def test_packed_targets_elsewhere_are_refused(name: str) -> None:
    outputs, targets = arguments_of(name)
    packed, outputs["dn_meta"] = criterion_of(name).prepare(targets, outputs["dn_meta"])
    away = dt.Targets(*(x.to("meta") for x in packed))
    with pytest.raises(ValueError, match="Criterion, Targets: labels must be on cpu, got meta"):
        criterion_of(name)(outputs, away)
    with pytest.raises(ValueError, match="Criterion, Targets: labels must be integers"):
        criterion_of(name)(outputs, packed._replace(labels=packed.labels.float()))


@over_criteria
@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": True},
        {"gamma": False},
        {"gamma": "2"},
        {"num_classes": True},
        {"num_classes": 80.0},
        {"num_classes": 0},
        {"weight_dict": {"loss_vfl": True}},
        {"weight_dict": {"loss_vfl": None}},
        {"weight_dict": 80},
        {"weight_dict": nn.Identity()},
    ],
    ids=str,
)
def test_the_constructor_takes_numbers_for_numbers(name: str, wrong: dict[str, Any]) -> None:
    key = next(iter(wrong))
    with pytest.raises((TypeError, ValueError), match=f"^{CRITERIA[name].__name__}: {key}"):
        CRITERIA[name](**{"weight_dict": WEIGHTS[name], **wrong})


@pytest.mark.parametrize("reg_max", [True, 32.0, 3, 33])
def test_dfine_takes_an_even_number_of_bins(reg_max: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^DFINECriterion: reg_max must be"):
        DFINECriterion(DFINE_WEIGHTS, reg_max=reg_max)


def test_a_weight_replaced_later_is_checked(name: str = "detr") -> None:
    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    criterion.weight_dict = {**DETR_WEIGHTS, "loss_bbox": None}
    with pytest.raises(TypeError, match=r"^DetrCriterion: weight_dict\['loss_bbox'\]"):
        criterion(outputs, targets)


@pytest.mark.parametrize(
    "arguments",
    [
        (COSTS, True, 0.25),
        (COSTS, 0.25, False),
        (COSTS, "0.25"),
        (1, 5, 2),
        (None,),
        ({"cost_class": True},),
        ({"cost_class": "2"},),
        ({},),
        ({"cost_mask": 1},),
    ],
    ids=str,
)
def test_the_matcher_takes_numbers_for_numbers(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^HungarianMatcher: [a-z_]+ must"):
        HungarianMatcher(*arguments)


def test_the_matcher_names_what_is_wrong() -> None:
    outputs, targets = arguments_of("detr")
    matcher = HungarianMatcher(COSTS)
    with pytest.raises(TypeError, match=r"^HungarianMatcher: pred_boxes must be a tensor"):
        matcher({"pred_logits": outputs["pred_logits"]}, targets)
    with pytest.raises(ValueError, match=r"^HungarianMatcher: targets has 1 images"):
        matcher(outputs, targets[:1])
    with pytest.raises(ValueError, match=r"^HungarianMatcher: targets\[1\] must have .*'labels'"):
        matcher(outputs, [targets[0], {"boxes": targets[1]["boxes"]}])


# Packed targets wherever targets go.


@over_criteria
@pytest.mark.parametrize("counts", ALL_COUNTS, ids=str)
def test_public_parts_take_packed_targets(name: str, counts: list[int]) -> None:
    outputs, targets = arguments_of(name, counts)
    criterion = criterion_of(name)
    packed, dn_meta = criterion.prepare(targets, outputs["dn_meta"])

    def assert_same_pairs(ours: Any, theirs: Any) -> None:
        for (queries, found), (expected, target) in zip(ours, theirs, strict=True):
            assert torch.equal(queries, expected) and torch.equal(found, target)

    pairs = criterion.matcher(outputs, targets)
    assert_same_pairs(criterion.matcher(outputs, packed), pairs)
    given = criterion.get_cdn_matched_indices(outputs["dn_meta"], targets)
    for image, (queries, found) in enumerate(given):
        assert torch.equal(queries, outputs["dn_meta"]["dn_positive_idx"][image])
        assert found.tolist() == [*range(counts[image])] * GROUPS
    for meta in (outputs["dn_meta"], dn_meta):
        for boxes in (targets, packed):
            assert_same_pairs(type(criterion).get_cdn_matched_indices(meta, boxes), given)
    parts = ["loss_labels_vfl", "loss_boxes", *["loss_local"] * (name == "dfine")]
    for part in parts:
        expected = getattr(criterion, part)(outputs, targets, pairs, 5)
        assert_equal(getattr(criterion, part)(outputs, packed, pairs, 5), expected)
        assert_equal(getattr(criterion, part)(outputs, packed, {"indices": pairs}, 5), expected)


@over_criteria
def test_listed_positives_of_packed_targets_are_checked(name: str) -> None:
    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    packed, _ = criterion.prepare(targets)
    criterion(outputs, packed)
    rows = outputs["dn_meta"]["dn_positive_idx"]
    for wrong in (rows[1][1:], rows[1].repeat(20)):
        outputs["dn_meta"] = {"dn_positive_idx": [rows[0], wrong], "dn_num_group": GROUPS}
        with pytest.raises(ValueError, match=r"dn_positive_idx\[1\] must have"):
            criterion(outputs, packed)


# Units.


def xyxy(boxes: Tensor) -> Tensor:
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)


def of_targets(function: Callable[[Tensor], Tensor]) -> Change:
    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        for i, given in enumerate(targets):
            targets[i] = {**given, "boxes": function(given["boxes"])}

    return change


def of_predictions(kind: str, function: Callable[[Tensor], Tensor], key: str = "pred_boxes") -> Any:
    def change(outputs: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        layers = outputs[kind] if kind else outputs
        for one in layers if isinstance(layers, list) else [layers]:
            one[key] = function(one[key].detach()).requires_grad_()

    return change


def pixels(boxes: Tensor) -> Tensor:
    return boxes * 64


UNITS: list[tuple[str, Change, str]] = [
    ("target pixels", of_targets(pixels), r"targets\['boxes'\], image 0, entry \[0\]: .*normalis"),
    ("target percent", of_targets(lambda x: x * 100), r"targets\['boxes'\].*normalised"),
    ("target pixels xyxy", of_targets(lambda x: xyxy(x) * 640), r"targets\['boxes'\].*normalised"),
    ("target xyxy", of_targets(xyxy), r"targets\['boxes'\].*corners x1, y1, x2, y2"),
    ("pixels", of_predictions("", pixels), "pred_boxes, layer last"),
    ("no sigmoid", of_predictions("", torch.logit), "pred_boxes, layer last"),
    ("no sigmoid aux", of_predictions("aux_outputs", torch.logit), "pred_boxes, layer aux_0"),
]
UNITS_OF_DETR = [
    ("no sigmoid dn", of_predictions("dn_aux_outputs", torch.logit), "pred_boxes, layer dn_0"),
]
UNITS_OF_DFINE = [
    ("no sigmoid pre", of_predictions("pre_outputs", torch.logit), "pred_boxes, layer pre"),
    ("no sigmoid enc", of_predictions("enc_aux_outputs", torch.logit), "pred_boxes, layer enc_0"),
    ("no sigmoid dn", of_predictions("dn_outputs", torch.logit), "pred_boxes, layer dn_0"),
    ("reference", of_predictions("", torch.logit, "ref_points"), "ref_points, layer last"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *(pytest.param("detr", *u[1:], id=f"detr {u[0]}") for u in UNITS + UNITS_OF_DETR),
        *(pytest.param("dfine", *u[1:], id=f"dfine {u[0]}") for u in UNITS + UNITS_OF_DFINE),
    ],
)
@pytest.mark.parametrize("counts", [[6, 9], [20, 0, 3]], ids=str)
def test_validation_knows_the_unit(
    name: str, change: Change, message: str, counts: list[int]
) -> None:
    outputs, targets = arguments_of(name, counts)
    with validation(True):
        criterion_of(name)(outputs, targets)
        change(outputs, targets)
        with pytest.raises(ValueError, match=f"{CRITERIA[name].__name__}: {message}"):
            criterion_of(name)(outputs, targets)


@over_criteria
def test_validation_wants_a_number_of_boxes_above_0(name: str) -> None:
    outputs, targets = arguments_of(name)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with validation(True), pytest.raises(ValueError, match=r"num_boxes: .* above 0"):
            criterion_of(name)(outputs, targets, num_boxes=torch.tensor([wrong]))


def legal_boxes(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """(n, 4) cxcywh as data sets have them."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if kind == "clipped":
        a, b = uniform(n, 2), uniform(n, 2)
        return torch.cat([(a + b) / 2, (a - b).abs()], -1)
    if kind == "whole image":
        return torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(n, 1)
    if kind == "rounded":
        return legal_boxes("clipped", n, generator).half().float() * (1 + 1e-3)
    if kind == "points":
        return torch.cat([uniform(n, 2), torch.zeros(n, 2)], -1)
    # Of data that does not clip: most reach over a border, some by half of the image.
    return torch.cat([uniform(n, 2), 0.2 + 0.8 * uniform(n, 2)], -1)


@over_criteria
@pytest.mark.parametrize("kind", ["clipped", "whole image", "rounded", "points", "not clipped"])
def test_validation_takes_every_right_batch(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Of few boxes that leave the image, cxcywh and xyxy cannot be told apart.
    all_counts = [[12, 9], [16, 0]] if kind == "not clipped" else [[1], [0, 2], [5, 1], [12, 9]]
    with validation(True):
        for counts in all_counts * 5:
            outputs, targets = arguments_of(name, counts)
            for one in targets:
                one["boxes"] = legal_boxes(kind, len(one["labels"]), generator)
            criterion_of(name)(outputs, targets)


@over_criteria
def test_validation_takes_drawn_batches_of_few_boxes(name: str) -> None:
    """Those of the other tests, which leave the image by up to 0.075."""
    with validation(True):
        for seed in range(60):
            inputs = Inputs([1, seed % 3], CPU, torch.float32, seed=seed)
            criterion_of(name)(getattr(inputs, name)("aux"), inputs.targets)


# Layers before the decoder.


def encoder_layer(logits: int, queries: int = QUERIES, seed: int = 5) -> dict[str, Tensor]:
    inputs = Inputs([2, 3], CPU, torch.float32, seed=seed)
    made: dict[str, Tensor] = inputs.layer(queries)
    return {**made, "pred_logits": inputs.leaf(2, queries, logits)}


def test_detr_computes_the_encoder_as_one_more_layer(backend: str) -> None:
    outputs, targets = arguments_of("detr")
    encoder = [encoder_layer(CLASSES), encoder_layer(CLASSES, seed=6)]
    appended = {**outputs, "aux_outputs": [*outputs["aux_outputs"], *encoder]}
    expected = step(criterion_of("detr"), appended, targets)
    gradients = [x.grad for one in encoder for x in one.values()]
    for one in encoder:
        for x in one.values():
            x.grad = None
    losses = step(criterion_of("detr"), {**outputs, "enc_aux_outputs": encoder}, targets)
    # There, they came behind two auxiliary layers.
    renamed = {re.sub(r"_aux_([23])", lambda m: f"_enc_{int(m[1]) - 2}", k) for k in expected}
    assert losses.keys() == renamed
    for key, loss in expected.items():
        ours = losses[re.sub(r"_aux_([23])", lambda m: f"_enc_{int(m[1]) - 2}", key)]
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=1e-7, msg=key)
    leaves = [x for one in encoder for x in one.values()]
    for x, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("queries", "logits", "packed"),
    [(QUERIES - 2, 1, False), (QUERIES, CLASSES, True), (3 * QUERIES, 1, True)],
)
def test_detr_takes_an_encoder_of_any_kind(
    queries: int, logits: int, packed: bool, backend: str
) -> None:
    """With other queries than the decoder's, and with one logit for every class."""
    outputs, targets = arguments_of("detr")
    encoder = encoder_layer(logits, queries)
    alone = DetrCriterion(DETR_WEIGHTS, num_classes=logits, alpha=0.75)
    labels = [t if logits > 1 else {**t, "labels": 0 * t["labels"]} for t in targets]
    expected = alone(encoder, labels)
    without = criterion_of("detr")(outputs, targets)
    outputs["enc_aux_outputs"] = [encoder]
    given: Any = targets
    if packed:
        given, outputs["dn_meta"] = criterion_of("detr").prepare(targets, outputs["dn_meta"])
    losses = step(criterion_of("detr"), outputs, given)
    assert_equal({k: v for k, v in losses.items() if "_enc_" not in k}, without)
    of_encoder = {k.removesuffix("_enc_0"): v for k, v in losses.items() if k.endswith("_enc_0")}
    assert_equal(of_encoder, expected)
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in encoder.values())


def test_dfine_takes_an_encoder_without_classes(backend: str) -> None:
    outputs, targets = arguments_of("dfine")
    with_classes = criterion_of("dfine")(outputs, targets)
    encoder = {**outputs["enc_aux_outputs"][0], "pred_logits": encoder_layer(1)["pred_logits"]}
    losses = step(criterion_of("dfine"), {**outputs, "enc_aux_outputs": [encoder]}, targets)
    assert losses.keys() == with_classes.keys()
    alone = DFINECriterion(DFINE_WEIGHTS, num_classes=1, alpha=0.75)
    labels = [{**target, "labels": 0 * target["labels"]} for target in targets]
    expected = alone(encoder, labels)["loss_vfl"]
    torch.testing.assert_close(losses["loss_vfl_enc_0"], expected, rtol=1e-6, atol=0)
    short = {key: x[:, 1:] for key, x in encoder.items()}
    with pytest.raises(ValueError, match=r"^DFINECriterion: outputs_enc_0 pred_logits must have"):
        criterion_of("dfine")({**outputs, "enc_aux_outputs": [short]}, targets)


@over_criteria
def test_one_logit_is_the_encoders_only(name: str) -> None:
    outputs, targets = arguments_of(name)
    outputs["aux_outputs"][1]["pred_logits"] = torch.rand(2, QUERIES, 1)
    with pytest.raises(ValueError, match=r"outputs_aux_1 pred_logits .* num_classes = 4"):
        criterion_of(name)(outputs, targets)


@over_criteria
def test_an_encoder_without_classes_compiles_in_one_graph(name: str) -> None:
    """Predictions that are not read do not break it, and are warned of as in an eager step."""
    outputs, targets = arguments_of(name)
    outputs["enc_aux_outputs"] = [encoder_layer(1)]
    packed, outputs["dn_meta"] = criterion_of(name).prepare(targets, outputs["dn_meta"])
    expected = criterion_of(name)(outputs, packed)
    outputs["aux_output"] = outputs["aux_outputs"]
    torch._dynamo.reset()
    compiled = torch.compile(criterion_of(name), fullgraph=True, backend="eager")
    (message,) = warned_by(lambda: assert_equal(compiled(outputs, packed), expected))
    assert "outputs has aux_output, " in message
    assert not warned_by(lambda: compiled(outputs, packed))


# Warnings.


def warned_by(function: Callable[[], Any]) -> list[str]:
    """The texts of the library's warnings, all of which must point at this file."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        function()
    ours = [w for w in record if "Criterion" in str(w.message)]
    assert all(w.filename == __file__ and w.category is UserWarning for w in ours)
    return [str(w.message) for w in ours]


@over_criteria
@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"loss_ce": 1, "loss_bbox": 5, "loss_giuo": 2}, ("loss_ce", "loss_giuo", "no loss_vfl")),
        ({"loss_vfl": 1, "loss_bboxes": 5}, ("loss_bboxes",)),
        ({"loss_mal": 1, "loss_bbox": 5, "loss_giou": 2}, ("loss_mal", "no loss_vfl")),
        ({"loss_bbox": 5, "loss_giou": 2}, ("no loss_vfl",)),
        ({}, ("no loss_vfl",)),
    ],
    ids=str,
)
def test_weights_that_weigh_nothing_are_warned_of(
    name: str, weights: dict[str, Any], named: tuple[str, ...]
) -> None:
    (message,) = warned_by(lambda: CRITERIA[name](weights, num_classes=CLASSES))
    assert message.startswith(f"{CRITERIA[name].__name__}: weight_dict")
    assert all(word in message for word in named)
    if any(key not in WEIGHTS["dfine"] for key in weights):
        assert "loss_vfl, loss_bbox, loss_giou" in message


@over_criteria
def test_right_arguments_are_not_warned_of(name: str) -> None:
    outputs, targets = arguments_of(name)
    others: dict[str, Any] = {"hidden": torch.ones(2), "losses": [], "meta": {"a": 1}}
    assert not warned_by(lambda: criterion_of(name)({**outputs, **others}, targets))


@over_criteria
def test_weights_changed_later_are_warned_of_once(name: str) -> None:
    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    criterion.weight_dict = {**WEIGHTS[name], "loss_giuo": 1}

    def thrice() -> None:
        for _ in range(3):
            criterion(outputs, targets)

    (message,) = warned_by(thrice)
    assert "loss_giuo" in message
    assert not warned_by(thrice)


UNREAD = {
    "detr": ["dn_outputs", "pre_outputs", "aux_output", "enc_outputs"],
    "dfine": ["dn_aux_outputs", "aux_output", "enc_outputs", "interm_outputs"],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in UNREAD[name]])
@pytest.mark.parametrize("listed", [False, True], ids=["one", "a list"])
def test_predictions_that_are_not_read_are_warned_of_once(
    name: str, key: str, listed: bool
) -> None:
    outputs, targets = arguments_of(name)
    for extra in UNREAD[name]:
        outputs.pop(extra, None)
    expected = criterion_of(name)(outputs, targets)
    more = encoder_layer(CLASSES)
    outputs[key] = [more] if listed else more
    criterion = criterion_of(name)
    (message,) = warned_by(lambda: assert_equal(criterion(outputs, targets), expected))
    assert message.startswith(f"{type(criterion).__name__}: outputs has {key}, ")
    assert "aux_outputs, " in message and denoising_of(name) in message
    assert not warned_by(lambda: criterion(outputs, targets))


def test_denoising_before_the_decoder_alone_is_warned_of() -> None:
    outputs, targets = arguments_of("dfine")
    del outputs["dn_outputs"]
    criterion = criterion_of("dfine")
    (message,) = warned_by(lambda: criterion(outputs, targets))
    assert "dn_pre_outputs without dn_outputs" in message
    outputs["dn_outputs"] = []
    assert "loss_vfl_dn_pre" in criterion(outputs, targets)


# Matchers of other projects, and parts that are overridden.


class Foreign(nn.Module):
    """Another project's matcher: it counts its calls and keeps what it got."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.inner = [HungarianMatcher(COSTS)]
        self.calls: list[tuple[Any, Any]] = []

    def forward(self, outputs: Any, targets: Any) -> Any:
        self.calls.append((outputs, targets))
        pairs: Any = self.inner[0](outputs, targets)
        if self.form == "dictionary":
            return {"indices": pairs}
        if self.form == "rows":
            return [torch.stack(pair) for pair in pairs]
        if self.form == "arrays":
            return tuple((queries.numpy(), found.int().numpy()) for queries, found in pairs)
        return pairs


def matched_layers(name: str) -> int:
    return 3 if name == "detr" else 5


@over_criteria
@pytest.mark.parametrize("form", ["pairs", "dictionary", "rows", "arrays"])
@pytest.mark.parametrize("packed", [False, True], ids=["listed", "packed"])
@pytest.mark.parametrize("counts", ALL_COUNTS, ids=str)
def test_a_foreign_matcher_is_called_layer_by_layer(
    name: str, form: str, packed: bool, counts: list[int]
) -> None:
    outputs, targets = arguments_of(name, counts)
    expected = criterion_of(name)(outputs, targets)
    criterion = criterion_of(name)
    criterion.matcher = foreign = Foreign(form)
    given: Any = targets
    if packed:
        given, outputs["dn_meta"] = criterion.prepare(targets, outputs["dn_meta"])
    assert_equal(step(criterion, outputs, given), expected)
    assert len(foreign.calls) == matched_layers(name)
    for of_layer, images in foreign.calls:
        assert {"pred_logits", "pred_boxes"} <= of_layer.keys() and "aux_outputs" not in of_layer
        assert isinstance(images, list) and [len(image["labels"]) for image in images] == counts
    first, (*_, last) = foreign.calls[0][0], foreign.calls
    assert first["pred_logits"] is outputs["pred_logits"]
    assert last[0]["pred_logits"] is not outputs["pred_logits"]


def test_a_foreign_matcher_gets_an_encoder_without_classes() -> None:
    outputs, targets = arguments_of("detr")
    outputs["enc_aux_outputs"] = [encoder_layer(1)]
    expected = criterion_of("detr")(outputs, targets)
    criterion = criterion_of("detr")
    criterion.matcher = foreign = Foreign("pairs")
    assert_equal(criterion(outputs, targets), expected)
    assert all((image["labels"] == 0).all() for image in foreign.calls[-1][1])
    assert foreign.calls[0][1][1]["labels"].tolist() == targets[1]["labels"].tolist()


def first_pairs(pairs: Any) -> Any:
    return [(queries[:1], found[:1]) for queries, found in pairs]


class OwnCall(HungarianMatcher):
    def __call__(self, outputs: Any, targets: Any) -> Any:
        return first_pairs(super().__call__(outputs, targets))


class OwnForward(HungarianMatcher):
    def forward(self, outputs: Any, targets: Any) -> Any:
        return first_pairs(super().forward(outputs, targets))


def own_instance() -> HungarianMatcher:
    matcher = HungarianMatcher(COSTS)
    plain = matcher.forward
    matcher.forward = lambda outputs, targets: first_pairs(plain(outputs, targets))  # type: ignore
    return matcher


def hooked() -> HungarianMatcher:
    matcher = HungarianMatcher(COSTS)
    matcher.register_forward_hook(lambda module, arguments, pairs: first_pairs(pairs))
    return matcher


class OneOf(nn.Module):
    def forward(self, outputs: Any, targets: Any) -> Any:
        return first_pairs(HungarianMatcher(COSTS)(outputs, targets))


@over_criteria
@pytest.mark.parametrize(
    "make",
    [lambda: OwnCall(COSTS), lambda: OwnForward(COSTS), own_instance, hooked],
    ids=["call", "forward", "instance", "hook"],
)
def test_a_matcher_of_ours_with_a_call_of_its_own_is_called(
    name: str, make: Callable[[], HungarianMatcher]
) -> None:
    outputs, targets = arguments_of(name)
    criterion, other = criterion_of(name), criterion_of(name)
    criterion.matcher, other.matcher = make(), OneOf()
    losses = criterion(outputs, targets)
    assert_equal(losses, other(outputs, targets))
    assert losses["loss_bbox"] != criterion_of(name)(outputs, targets)["loss_bbox"]


@over_criteria
def test_hooks_of_the_matcher_fire(name: str) -> None:
    outputs, targets = arguments_of(name)
    expected = criterion_of(name)(outputs, targets)
    criterion, calls = criterion_of(name), []
    criterion.matcher.register_forward_pre_hook(lambda module, given: calls.append(given))
    handle = criterion.matcher.register_forward_hook(lambda *given: calls.append(given))
    assert_equal(criterion(outputs, targets), expected)
    assert len(calls) == 2 * matched_layers(name)
    handle.remove()
    criterion(outputs, targets)
    assert len(calls) == 3 * matched_layers(name)


@over_criteria
def test_one_target_may_have_several_queries(name: str) -> None:
    class Repeated(nn.Module):
        def forward(self, outputs: Any, targets: Any) -> Any:
            counts = [len(target["labels"]) for target in targets]
            return [(torch.arange(2 * n), torch.arange(n).repeat(2)) for n in counts]

    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    criterion.matcher = Repeated()
    losses = criterion(outputs, targets)
    boxes = torch.cat([one["boxes"].repeat(2, 1) for one in targets])
    found = torch.cat([outputs["pred_boxes"][i, : 2 * n] for i, n in enumerate([2, 3])])
    # D-FINE's is over the pairs, DETR's over the boxes.
    expected = 5.0 * (found - boxes).abs().sum() / (5 if name == "detr" else 10)
    torch.testing.assert_close(losses["loss_bbox"], expected)


def pairs_of(queries: Any, found: Any) -> Any:
    return [(torch.tensor([0]), torch.tensor([0])), (queries, found)]


@over_criteria
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "must be a list of pairs"),
        ({"other": []}, "must be a list of pairs"),
        ([], "must be a list of pairs .* 2 images, got 0 of them"),
        ([1, 2], "image 0: indices must be a pair"),
        (pairs_of("a", "b"), "image 1: indices must be two tensors, got str"),
        (pairs_of(torch.tensor([0.0]), torch.tensor([0])), "image 1: .* integers .*float32"),
        (pairs_of(torch.tensor([True]), torch.tensor([0])), "image 1: .* integers .*bool"),
        (pairs_of(torch.tensor([[0]]), torch.tensor([[0]])), r"image 1: .* \(1, 1\)"),
        (pairs_of(torch.tensor([0, 1]), torch.tensor([0])), "image 1: .* got 2 and 1"),
        (pairs_of(torch.tensor([QUERIES]), torch.tensor([0])), r"queries must be in \[0, 6\)"),
        (pairs_of(torch.tensor([-1]), torch.tensor([0])), "image 1: .* queries must be in"),
        (pairs_of(torch.tensor([0]), torch.tensor([3])), r"targets must be in \[0, 3\), got 3"),
        (pairs_of(torch.tensor([1, 1]), torch.tensor([0, 1])), "image 1: .* each query once"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_an_answer_that_holds_no_pairs_is_refused(name: str, answer: Any, message: str) -> None:
    class Own(nn.Module):
        def forward(self, outputs: Any, targets: Any) -> Any:
            return answer

    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    kind = type(criterion).__name__
    with pytest.raises((TypeError, ValueError), match=f"^{kind}[^\n]*{message}"):
        criterion.loss_boxes(outputs, targets, answer, 5)
    criterion.matcher = Own()
    with pytest.raises(
        (TypeError, ValueError), match=f"^{kind}, matcher Own, layer last[^\n]*{message}"
    ):
        criterion(outputs, targets)


@over_criteria
def test_what_is_no_matcher_is_refused(name: str) -> None:
    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    criterion.matcher = None
    with pytest.raises(TypeError, match=r"Criterion: matcher must be callable .*, got NoneType"):
        criterion(outputs, targets)


def test_a_cost_of_a_matchers_own_is_refused() -> None:
    """OTX's matcher calls such functions, ours does not."""
    with pytest.raises(TypeError, match="Own defines label_cost, which is not called"):
        type("Own", (HungarianMatcher,), {"label_cost": lambda *arguments: 0})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("detr", m) for m in ("loss_labels_vfl", "loss_boxes", "get_cdn_matched_indices")),
        *(("dfine", m) for m in ("loss_labels_vfl", "loss_boxes", "loss_local", "fgl_loss")),
        *(("dfine", m) for m in ("_available_losses", "_get_go_indices", "prepare")),
    ],
)
def test_an_override_of_an_instance_or_of_otx_is_refused(name: str, method: str) -> None:
    def own(*arguments: Any) -> Any:
        return {}

    outputs, targets = arguments_of(name)
    criterion = criterion_of(name)
    setattr(criterion, method, own)
    with pytest.raises(TypeError, match=f"overrides {method}, which forward does not call"):
        criterion(outputs, targets)
    with pytest.raises(TypeError, match=f"Own overrides {method}, which forward does not call"):
        type("Own", (CRITERIA[name],), {method: own})
