"""DETLOSS_VALIDATE: what is legal passes, what is not is named; off, no value is looked at."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synchronisation import NoHostReads
from test_criteria import made
from test_detr import CLASSES, EXTRAS, QUERIES, Inputs, criterion_of
from torch import Tensor
from trees import leaves

import detloss_triton as dt
from detloss_triton import validation
from detloss_triton.bench.batches import DENSE as BUILDERS

# Drawn at random, positive 16 of these has its bottom edge 0.8 pixels above its top.
CROSSED_BY_CHANCE = ("yolox-default", "yolox-no_l1", "yolox-one_class")
FILES = sorted((Path(__file__).parent / "golden").glob("*.pt"))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_golden_inputs_are_legal(file: Path) -> None:
    golden: dict[str, Any] = torch.load(file, weights_only=True)
    criterion = eval(golden["criterion"], {**vars(dt), **golden["params"]})
    with validation(True):
        if file.stem in CROSSED_BY_CHANCE:
            with pytest.raises(ValueError, match=r"bbox_targets, image 1, positive 16: .*y2 >= y1"):
                criterion(**golden["inputs"])
            golden["inputs"]["bbox_targets"][16, 3] += 1
        criterion(**golden["inputs"])


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("positives", [0.3, 0.0])
def test_drawn_batches_are_legal(name: str, positives: float, device: torch.device) -> None:
    batch = BUILDERS[name](positives=positives).on(device)
    with validation(True):
        made(batch, device)(**batch.inputs)


@pytest.mark.parametrize("name", ["detr", "dfine"])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [QUERIES + 8, 1]], ids=str)
def test_drawn_layers_are_legal(name: str, counts: list[int], device: torch.device) -> None:
    """Listed and packed targets; denoising where there is a box to denoise."""
    inputs = Inputs(counts, device, torch.float32)
    extras = EXTRAS if max(counts) else ("aux",)
    outputs, criterion = getattr(inputs, name)(*extras), criterion_of(name)
    packed, dn_meta = criterion.prepare(inputs.targets, outputs.get("dn_meta"))
    with validation(True):
        criterion(outputs, inputs.targets)
        criterion({**outputs, "dn_meta": dn_meta}, packed)


def test_what_teaches_nothing_may_hold_anything(device: torch.device) -> None:
    """Targets of background, labels of weight 0 or to be ignored, boxes of padding, crossed ones
    that are only predicted."""
    atss = BUILDERS["atss"]().on(device)
    labels, weights = atss.inputs["labels"][0], atss.inputs["label_weights"][0]
    atss.inputs["bbox_targets"][0][labels == 5] = NAN
    labels[0, :3] = torch.tensor([-1, -100, 99], device=device)
    weights[0, :3] = 0
    rtmdet = BUILDERS["rtmdet"]().on(device)
    with torch.no_grad():
        rtmdet.inputs["bbox_pred"][0].copy_(rtmdet.inputs["bbox_pred"][0].flip(-1))
    yolov9 = BUILDERS["yolov9"]().on(device)
    targets = yolov9.inputs["targets"]
    targets[1, -1] = torch.tensor([-1, NAN, 5, -INF, 0], device=device)
    ssd = BUILDERS["ssd"]().on(device)
    ssd.inputs["avg_factor"] = 0
    ssd.inputs["labels"][0, :2] = torch.tensor([-1, -100], device=device)
    ssd.inputs["label_weights"][0, :2] = 1
    ssd.inputs["bbox_weights"][0, :2] = 0
    with validation(True):
        for batch in (atss, rtmdet, yolov9, ssd):
            made(batch, device)(**batch.inputs)


@pytest.mark.parametrize("label", [-1, -100])
@pytest.mark.parametrize("name", ["atss", "rtmdet"])
def test_focal_losses_ignore_no_label(name: str, label: int, device: torch.device) -> None:
    """One of weight is background to them, so it is refused; to cross-entropy it is nothing."""
    batch = BUILDERS[name](positives=0.0).on(device)
    labels, weights = batch.inputs["labels"][0], batch.inputs["label_weights"][0]
    weights.fill_(1)
    criterion = made(batch, device)
    background = criterion(**batch.inputs)["loss_cls"][0]
    labels[0, 3] = label
    torch.testing.assert_close(criterion(**batch.inputs)["loss_cls"][0], background)
    message = r"labels, level 0, image 0, entry \[3\]: .*where label_weights is not 0, got -1"
    with validation(True), pytest.raises(ValueError, match=message):
        criterion(**batch.inputs)
    if name == "atss":
        with validation(True):
            made(batch, device, loss_cls=dt.CrossEntropyLoss(use_sigmoid=True))(**batch.inputs)


def put(argument: str, *index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Write a value, or a box, at an index of an argument; of a level of it, if it has levels."""

    def change(inputs: dict[str, Any]) -> None:
        entry, at = inputs[argument], list(index)
        while isinstance(entry, (list, tuple)):
            entry = entry[at.pop(0)]
        with torch.no_grad():
            entry[tuple(at)] = torch.as_tensor(value).to(entry)

    return change


def put_in_a_positive(argument: str, mask: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Write a value at the first positive of the second image."""

    def change(inputs: dict[str, Any]) -> None:
        entry, labels = inputs[argument], inputs[mask]
        if isinstance(entry, list):
            entry, labels = entry[0], labels[0]
        anchor = (labels[1] < 5).nonzero()[0, 0]
        entry[1, anchor] = torch.as_tensor(value).to(entry)

    return change


def replaced(argument: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda inputs: inputs.__setitem__(argument, value)


def one_based(argument: str) -> Callable[[dict[str, Any]], None]:
    """Labels of objects from 1 on, so that the last class looks like background."""

    def change(inputs: dict[str, Any]) -> None:
        levels = inputs[argument]
        for labels in levels if isinstance(levels, list) else [levels]:
            labels[labels < 5] += 1

    return change


def scaled(argument: str, factor: float) -> Callable[[dict[str, Any]], None]:
    """An argument in other units: boxes in [0, 1] for boxes in pixels, per cent for shares."""

    def change(inputs: dict[str, Any]) -> None:
        levels = inputs[argument]
        for x in levels if isinstance(levels, list) else [levels]:
            x.mul_(factor)

    return change


def deltas(inputs: dict[str, Any]) -> None:
    """What the coder encodes, sorted so that they pass for boxes."""
    for level, anchors in enumerate(inputs["anchors"]):
        codes = dt.DeltaXYWHBBoxCoder().encode(anchors, inputs["bbox_targets"][level])
        inputs["bbox_targets"][level] = codes.sort(-1).values


CROSSED = [5.0, 1.0, 2.0, 9.0]
DENSE: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    (
        "atss",
        put("labels", 2, 1, 3, value=7),
        r"ATSSCriterion: labels, level 2, image 1, entry \[3\]: expected a label in \[0, 5\), or "
        r"5 for background, where label_weights is not 0, got 7",
    ),
    ("atss", put("labels", 0, 1, 3, value=-2), r"labels, level 0, image 1, .*got -2"),
    ("atss", put("labels", 0, 1, 3, value=2**40), r"labels, level 0, image 1, .*got 1099511627776"),
    ("atss", put("cls_score", 1, 1, 2, 3, 0, value=NAN),
     r"cls_score, level 1, image 1, entry \[2, 3, 0\]: expected a finite number, got nan"),
    ("atss", put("centerness", 0, 0, 0, 1, 1, value=INF), "centerness, level 0, image 0.*got inf"),
    ("atss", put("bbox_pred", 0, 0, 0, 1, 1, value=-INF), "bbox_pred, level 0, image 0.*got -inf"),
    ("atss", put("anchors", 1, 1, 0, value=CROSSED), r"anchors, level 1, image 1, entry \[0\]"),
    ("atss", put_in_a_positive("bbox_targets", "labels", CROSSED),
     r"bbox_targets, level 0, image 1, .*x2 >= x1 and y2 >= y1, got \[5.0, 1.0, 2.0, 9.0\]"),
    ("atss", put("label_weights", 0, 1, 0, value=-1), "label_weights, level 0, image 1.*got -1.0"),
    ("atss", replaced("avg_factor", NAN), "avg_factor: expected a finite number above 0, got nan"),
    ("atss", replaced("avg_factor", 0), "avg_factor: expected a finite number above 0, got 0"),
    ("atss", scaled("bbox_targets", 1 / 64), "bbox_targets, level 0, .* that meets its anchor, gi"),
    ("atss", scaled("anchors", 1 / 64), "bbox_targets, level 0, .* that meets its anchor, given"),
    ("atss", deltas, "bbox_targets, level 0, .* that meets its anchor, given after it, got "),
    ("rtmdet", one_based("labels"), "assign_metrics, level 0, .* 0, as the label is no class, got"),
    ("rtmdet", scaled("assign_metrics", 100), "assign_metrics, level 0, .* a number in .0, 1., go"),
    ("rtmdet", put("assign_metrics", 0, 1, 3, value=-0.1), "assign_metrics, level 0, .*, got -0.1"),
    ("ssd", one_based("labels"), "bbox_weights, image 0, .* 0, as the label is no class, got 1.0"),
    ("yolox", scaled("cls_targets", 100), "cls_targets, image 0, positive 0: .* a number in .0, 1"),
    ("yolox", scaled("obj_targets", 255), "obj_targets, image 0, .* a number in .0, 1., got 255.0"),
    ("rtmdet", put("labels", 0, 1, 3, value=6), "RTMDetCriterion: labels, level 0, image 1"),
    ("rtmdet", put("bbox_pred", 0, 1, 3, value=NAN), "bbox_pred, level 0, image 1.*got nan"),
    ("rtmdet", put("assign_metrics", 1, 1, 3, value=INF), "assign_metrics, level 1, image 1"),
    ("ssd", put("labels", 1, 3, value=6), r"SSDCriterion: labels, image 1, entry \[3\].*got 6"),
    ("ssd", put("cls_score", 1, 3, 0, value=NAN), "cls_score, image 1.*got nan"),
    ("ssd", put("anchor", 1, 3, value=CROSSED), "anchor, image 1"),
    ("ssd", put_in_a_positive("bbox_targets", "labels", INF), "bbox_targets, image 1.*got inf"),
    ("ssd", replaced("avg_factor", -1.0), "avg_factor: expected .* at least 0, got -1"),
    ("yolox", put("flatten_objectness", 1, 3, value=NAN), "YOLOXCriterion: flatten_objectness, im"),
    ("yolox", put("bbox_targets", -1, value=CROSSED), r"bbox_targets, image 1, positive \d+: exp"),
    ("yolox", put("cls_targets", -1, 2, value=NAN), r"cls_targets, image 1, positive \d+"),
    ("yolox", put("pos_masks", 0, value=True), r"pos_masks: expected \d+ set entries, got \d+"),
    ("yolox", replaced("num_total_samples", torch.tensor(0.0)), "num_total_samples: .*got 0.0"),
    ("yolov9", put("targets", 0, 1, 0, value=5), r"YOLOv9Criterion: targets, image 0, entry \[1\]"),
    ("yolov9", put("targets", 0, 1, 0, value=0.5), r"targets, image 0, entry \[1\]"),
    ("yolov9", put("targets", 0, 1, 0, value=-2), r"targets, image 0, entry \[1\]"),
    ("yolov9", put("targets", 0, 1, value=[1, *CROSSED]), r"targets, image 0, entry \[1\]"),
    ("yolov9", put("main_preds", 2, 0, 1, 0, 1, 1, value=NAN),
     r"main_preds, level 2, classes, image 1, entry \[0, 1, 1\]: .*got nan"),
    ("yolov9", put("aux_preds", 0, 2, 1, 0, 1, 1, value=INF), "aux_preds, level 0, distances, ima"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), DENSE, ids=[m[:40] for *_, m in DENSE])
def test_dense_criteria_name_what_is_wrong(
    name: str, change: Callable[[dict[str, Any]], None], message: str, device: torch.device
) -> None:
    batch = BUILDERS[name](positives=0.3).on(device)
    for path, weights in leaves(batch.inputs):
        if path.startswith("label_weights"):
            weights.fill_(1)
    criterion = made(batch, device)
    change(batch.inputs)
    # YOLOX counts its mask in any case where the host is the device.
    if "set entries" not in message or device.type != "cpu":
        criterion(**batch.inputs)
    with validation(True), pytest.raises(ValueError, match=message):
        criterion(**batch.inputs)


def layered(
    inputs: Inputs, outputs: dict[str, Any], where: str, *index: int, value: Any
) -> tuple[dict[str, Any], Any]:
    """Outputs and targets with one value written: in outputs["a.0.b"] or in the packed targets."""
    criterion = criterion_of("dfine" if "pred_corners" in outputs else "detr")
    packed, dn_meta = criterion.prepare(inputs.targets, outputs.get("dn_meta"))
    outputs = {**outputs, "dn_meta": dn_meta}
    entries = dict(leaves({**outputs, **packed._asdict()}))
    with torch.no_grad():
        entries[where][index] = torch.as_tensor(value).to(entries[where])
    return outputs, packed


LAYERED = [
    ("labels", (2, 1), CLASSES, r"targets\['labels'\], image 2, entry \[1\]: expected a label"),
    ("labels", (0, 1), -1, r"targets\['labels'\], image 0, entry \[1\]: .*got -1"),
    ("boxes", (2, 1, 3), -0.1, r"targets\['boxes'\], image 2, entry \[1\]: .*w >= 0 and h >= 0"),
    ("boxes", (2, 1, 0), NAN, r"targets\['boxes'\], image 2, entry \[1\]"),
    ("counts", (1,), 9, r"targets\['counts'\], image 1: expected 0 to 8 boxes, got 9"),
    ("pred_logits", (1, 2, 3), NAN, r"pred_logits, layer last, image 1, entry \[2, 3\]"),
    ("aux_outputs.1.pred_boxes", (1, 2, 3), INF, "pred_boxes, layer aux_1, image 1"),
    ("dn_meta.dn_positive_idx", (2, 1, 0), 99, r"dn_positive_idx, image 2, entry \[1, 0\]"),
    ("dn_meta.dn_positive_idx", (2, 1, 2), -1, r"dn_positive_idx, image 2, entry \[1, 2\].*-1"),
    ("dn_meta.dn_positive_idx", (1, 0, 0), 3, r"dn_positive_idx, image 1, entry \[0, 0\].*got 3"),
]
DETR_ONLY = [("dn_aux_outputs.0.pred_logits", (0, 1, 0), NAN, "pred_logits, layer dn_0, image 0")]
DFINE_ONLY = [
    ("pre_outputs.pred_boxes", (0, 1, 0), NAN, "pred_boxes, layer pre, image 0"),
    ("enc_aux_outputs.0.pred_boxes", (0, 1, 0), NAN, "pred_boxes, layer enc_0, image 0"),
    ("dn_outputs.1.pred_corners", (0, 1, 0), NAN, "pred_corners, layer dn_1, image 0"),
    ("aux_outputs.1.ref_points", (0, 1, 0), NAN, "ref_points, layer aux_1, image 0"),
    ("reg_scale", (0,), INF, "reg_scale, layer last: expected a finite number"),
]


@pytest.mark.parametrize(
    ("name", "where", "index", "value", "message"),
    [
        *(("detr", *row) for row in LAYERED + DETR_ONLY),
        *(("dfine", *row) for row in LAYERED + DFINE_ONLY),
    ],
    ids=lambda v: v if isinstance(v, str) and "[" not in v else "",
)
def test_set_criteria_name_what_is_wrong(
    name: str, where: str, index: tuple[int, ...], value: Any, message: str, device: torch.device
) -> None:
    inputs = Inputs([2, 0, 3], device, torch.float32)
    outputs, targets = layered(inputs, getattr(inputs, name)(*EXTRAS), where, *index, value=value)
    criterion = criterion_of(name)
    criterion(outputs, targets)
    message = f"{type(criterion).__name__}: {message}"
    with validation(True), pytest.raises(ValueError, match=message):
        criterion(outputs, targets)


def test_validation_holds_as_function_and_ends_as_context(device: torch.device) -> None:
    batch = BUILDERS["ssd"]().on(device)
    criterion = made(batch, device)
    run = functools.partial(criterion, **{**batch.inputs, "avg_factor": NAN})
    with validation(True):
        with validation(False):
            run()
        with pytest.raises(ValueError, match="avg_factor"):
            run()
    run()
    validation(True)
    with pytest.raises(ValueError, match="avg_factor"):
        run()
    validation(False)
    run()


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_device_is_read_under_validation_only(name: str, device: torch.device) -> None:
    """The detector that proves the criteria free of waits does see the checks."""
    batch = BUILDERS[name]().on(device)
    if "avg_factor" in batch.inputs:
        batch.inputs["avg_factor"] = torch.tensor(batch.inputs["avg_factor"], device=device)
    criterion = made(batch, device)
    with NoHostReads(device):
        criterion(**batch.inputs)
    with validation(True), pytest.raises((AssertionError, RuntimeError)), NoHostReads(device):
        criterion(**batch.inputs)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_set_criteria_take_predictions_of_the_targets_images(name: str) -> None:
    inputs = Inputs([2, 0, 3], torch.device("cpu"), torch.float32)
    outputs = getattr(inputs, name)()
    with pytest.raises(ValueError, match="targets has 2 images, the predictions have 3"):
        criterion_of(name)(outputs, inputs.targets[:2])


def test_the_environment_turns_validation_on() -> None:
    from test_backend import python

    code = """
import importlib, os
from detloss_triton import validate
found = [validate.enabled()]
for value in ("1", "0", "", "true", "Yes", "ON", "false", "No", "OFF", " "):
    os.environ["DETLOSS_VALIDATE"] = value
    found.append(importlib.reload(validate).enabled())
print(*map(int, found))
"""
    assert python(code).stdout.strip() == "0 1 0 0 1 1 1 0 0 0 0"


def test_a_word_that_is_no_answer_is_refused() -> None:
    """By a criterion, not at import; whoever says on or off in the program has the last word."""
    from test_backend import python

    code = """
import detloss_triton as dt
from detloss_triton.bench.batches import ssd
batch = ssd()
with dt.validation(False):
    batch.make()(**batch.inputs)
print("imported")
batch.make()(**batch.inputs)
"""
    run = python(code, DETLOSS_VALIDATE="maybe")
    assert run.stdout.strip() == "imported"
    words = "1, true, yes, on, 0, false, no, off, or empty"
    assert f"ValueError: DETLOSS_VALIDATE must be one of {words}, got 'maybe'" in run.stderr


def test_messages_are_one_line() -> None:
    batch = BUILDERS["atss"]()
    batch.inputs["anchors"][0][0, 0] = torch.tensor(CROSSED)
    with validation(True), pytest.raises(ValueError) as error:
        made(batch, torch.device("cpu"))(**batch.inputs)
    assert re.fullmatch(r"[^\n]{20,200}", str(error.value))
    assert isinstance(batch.inputs["anchors"][0], Tensor)
