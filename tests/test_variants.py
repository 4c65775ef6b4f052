"""The variants of the set criteria that other projects train with, against formulas and theirs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from plain import giou, iou_union_hull, xyxy
from test_detr import CLASSES, DETR_WEIGHTS, DFINE_WEIGHTS, QUERIES, REG_MAX, Inputs
from torch import Tensor

from detloss_triton import DetrCriterion, DFINECriterion, HungarianMatcher, sum_losses
from detloss_triton import backend as backends
from detloss_triton.criteria.set_prediction import CLASS_LOSSES, MATCHING_COSTS
from detloss_triton.engine import mapped
from detloss_triton.ops.matching import match_cost
from detloss_triton.ops.queries import iou_of, matched_targets
from detloss_triton.targets import pack

CPU = torch.device("cpu")
ALPHA, GAMMA, EOS = 0.3, 1.5, 0.1

over_choices = pytest.mark.parametrize("choice", CLASS_LOSSES)


def batch(device: torch.device, n_classes: int = CLASSES) -> Inputs:
    """Some queries of which find their targets, so that IoUs are not all 0."""
    inputs = Inputs([2, 3], device, torch.float32, settled=True)
    for target in inputs.targets:
        target["labels"] = target["labels"].clamp(max=n_classes - 1)
    return inputs


def classes_of(choice: str) -> int:
    """The last logit of a softmax is of no object."""
    return CLASSES - (choice == "labels")


def criterion_of(choice: str, **more: Any) -> DetrCriterion:
    return DetrCriterion(
        {CLASS_LOSSES[choice][0]: 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
        ALPHA,
        GAMMA,
        classes_of(choice),
        losses=[choice, "boxes"],
        **more,
    )


def formula(choice: str, x: Tensor, label: Tensor, iou: Tensor, n_boxes: int) -> Tensor:
    """Of logits (B, Q, C), each query's label, -1 for none, and IoU."""
    one_hot = F.one_hot(label.clamp(min=0), x.shape[-1]) * (label >= 0).unsqueeze(-1)
    q, p, held = iou.unsqueeze(-1) * one_hot, x.sigmoid(), x.detach().sigmoid()
    if choice == "labels":
        weight = x.new_ones(x.shape[-1])
        weight[-1] = EOS
        label = label.masked_fill(label < 0, x.shape[-1] - 1)
        return F.cross_entropy(x.flatten(0, 1), label.flatten(), weight)
    target, positive, negative = {
        "vfl": (q, q, ALPHA * held**GAMMA),
        "mal": (q**GAMMA, 1.0, held**GAMMA),
        "focal": (one_hot, ALPHA * (1 - p) ** GAMMA, (1 - ALPHA) * p**GAMMA),
        "bce": (one_hot, 1.0, 1.0),
        "ia_bce": ((held**ALPHA * q ** (1 - ALPHA)).clamp(min=0.01) * one_hot, 1.0, p**GAMMA),
    }[choice]
    each = F.binary_cross_entropy_with_logits(x, target.to(x.dtype), reduction="none")
    positive, negative = torch.as_tensor(positive), torch.as_tensor(negative)
    return (each * torch.where(one_hot > 0, positive, negative)).sum() / n_boxes


def found_by(criterion: DetrCriterion, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """(label, IoU) of each query of the last layer, as its matcher pairs them."""
    packed = pack(targets)
    logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"].detach()
    matches = criterion.matcher.match(logits[None], boxes[None], packed)
    found = matched_targets(matches, packed.labels, packed.boxes)
    return found.labels[0], iou_of(boxes[None], found)[0]


@over_choices
def test_classification_losses_are_their_formulas(
    choice: str, backend: str, device: torch.device
) -> None:
    inputs = batch(device, classes_of(choice))
    outputs, criterion = inputs.detr("aux", "dn"), criterion_of(choice)
    losses = criterion(outputs, inputs.targets)
    key = CLASS_LOSSES[choice][0]
    names = {name.split("_aux")[0].split("_dn")[0] for name in losses}
    assert names == {key, "loss_bbox", "loss_giou"}
    label, iou = found_by(criterion, outputs, inputs.targets)
    assert (iou > 0).any()
    x = outputs["pred_logits"].detach().double().requires_grad_()
    expected = 2.0 * formula(choice, x, label, iou.double(), 5)
    torch.testing.assert_close(losses[key].double(), expected, rtol=2e-6, atol=0)
    (found,) = torch.autograd.grad(losses[key], outputs["pred_logits"])
    (true,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-7)


@over_choices
def test_a_choice_launches_no_more(choice: str, kernels: None, device: torch.device) -> None:
    counts = []
    for name in ("vfl", choice):
        inputs = batch(device, classes_of(name))
        with backends.record_launches() as launches:
            sum_losses(criterion_of(name)(inputs.detr("aux", "dn"), inputs.targets)).backward()
        counts.append(len(launches))
    assert counts[1] == counts[0]


def test_mal_alpha_weighs_the_background() -> None:
    inputs = batch(CPU)
    outputs = inputs.detr()
    one, half, none = (
        criterion_of("mal", mal_alpha=alpha)(outputs, inputs.targets)["loss_mal"]
        for alpha in (None, 0.5, 0.0)
    )
    torch.testing.assert_close(half, (one + none) / 2)
    assert none < half


@over_choices
def test_dfine_takes_each(choice: str, backend: str, device: torch.device) -> None:
    """The other losses are as ever; one without a weight, or not named, is not computed."""
    inputs, key = batch(device, classes_of(choice)), CLASS_LOSSES[choice][0]
    outputs = inputs.dfine("aux", "dn")

    others = {name: DFINE_WEIGHTS[name] for name in DFINE_WEIGHTS if name != "loss_vfl"}

    def losses_of(*names: str, **weights: float) -> dict[str, Tensor]:
        n_classes = classes_of(choice) if choice in names else CLASSES
        return DFINECriterion(
            {**others, **weights}, ALPHA, GAMMA, n_classes, REG_MAX, losses=names
        )(outputs, inputs.targets)

    losses = losses_of(choice, "boxes", "local", **{key: 2.0})
    expected = losses_of("boxes", "local")
    assert key in losses and f"{key}_dn_1" in losses and "loss_ddf_aux_0" in losses
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    assert not any(name.startswith(key) for name in expected)
    assert not any("fgl" in name for name in losses_of(choice, "boxes", **{key: 2.0}))


def test_a_choice_is_checked() -> None:
    for losses in (["vlf"], "vfl", ["boxes", "local"]):
        with pytest.raises(ValueError, match=r"losses must be a list of .*, boxes, got"):
            DetrCriterion(DETR_WEIGHTS, losses=losses)
    with pytest.raises(ValueError, match=r"losses must have one of classes, got \['vfl', 'mal'\]"):
        DFINECriterion(DFINE_WEIGHTS, losses=["vfl", "boxes", "mal"])
    with pytest.warns(UserWarning, match="it has no loss_mal: no classification loss is computed"):
        DFINECriterion(DFINE_WEIGHTS, losses=["mal", "boxes", "local"])
    inputs = batch(CPU)
    with pytest.raises(ValueError, match=r"\(B, Q, num_classes \+ 1\) with num_classes = 4"):
        DetrCriterion(DETR_WEIGHTS, num_classes=4, losses=["labels"])(inputs.detr(), inputs.targets)


def test_a_label_of_no_object_is_background(backend: str, device: torch.device) -> None:
    """Also that of the last logit, which a target may not have."""
    inputs = batch(device)
    outputs, criterion = inputs.detr(), criterion_of("labels")
    losses = []
    for label in (CLASSES - 1, CLASSES + 7, -1):
        for target in inputs.targets:
            target["labels"] = torch.full_like(target["labels"], label)
        losses.append(criterion(outputs, inputs.targets)["loss_ce"])
    none = torch.full((2, QUERIES), -1, device=device)
    x = outputs["pred_logits"].detach().double()
    expected = 2.0 * formula("labels", x, none, none.double(), 5)
    for loss in losses:
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


# Their module, class, arguments and method of each loss.
THEIRS: dict[str, tuple[str, str, str]] = {
    "vfl": ("loss_rt_detr", "RTDetrLoss", "loss_labels_vfl"),
    "bce": ("loss_rt_detr", "RTDetrLoss", "loss_labels_bce"),
    "focal": ("loss_deformable_detr", "DeformableDetrImageLoss", "loss_labels"),
    "mal": ("loss_deimv2", "Deimv2Loss", "loss_labels_mal"),
    "ia_bce": ("loss_lw_detr", "LwDetrImageLoss", "loss_labels"),
    "labels": ("loss_for_object_detection", "ImageLoss", "loss_labels"),
}


def theirs_of(choice: str) -> Any:
    transformers = pytest.importorskip("transformers")
    module, kind, method = THEIRS[choice]
    made = getattr(importlib.import_module(f"transformers.loss.{module}"), kind)
    n = classes_of(choice)
    if module in ("loss_rt_detr", "loss_deimv2"):
        config = transformers.RTDetrConfig if "rt_detr" in module else transformers.Deimv2Config
        settings = {"focal_loss_alpha": ALPHA, "focal_loss_gamma": GAMMA}
        loss = made(config(num_labels=n, mal_gamma=GAMMA, **settings))
    elif choice == "labels":
        loss = made(None, n, EOS, ["labels"])
    else:
        loss = made(None, n, ALPHA, ["labels"], *([1] if choice == "ia_bce" else []))
    return getattr(loss, method)


@over_choices
def test_classification_losses_are_those_of_transformers(choice: str) -> None:
    inputs, theirs = batch(CPU, classes_of(choice)), theirs_of(choice)
    outputs = inputs.detr()
    criterion = criterion_of(choice)
    if choice in ("focal", "ia_bce"):  # they take no other
        criterion.gamma = 2.0
    pairs = criterion.matcher(outputs, inputs.targets)
    targets = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in inputs.targets]
    key = CLASS_LOSSES[choice][0]
    x = outputs["pred_logits"]
    given = {"logits": x, "pred_boxes": outputs["pred_boxes"]}
    (expected,) = (v for k, v in theirs(given, targets, pairs, 5.0).items() if k.startswith("loss"))
    loss = criterion(outputs, inputs.targets)[key] / 2.0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found, true = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected))
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-7)


# Matching.


def with_targets(
    device: torch.device, n_queries: int = QUERIES, settled: bool = True
) -> tuple[Any, Any]:
    inputs = Inputs([2, 3], device, torch.float32, settled=settled, queries=n_queries)
    return inputs.detr("aux"), inputs.targets


def cheapest(outputs: Any, targets: Any, cost: Any) -> list[tuple[Tensor, Tensor]]:
    """Of a cost of (logits (Q, C), corners (Q, 4), labels, corners (n, 4)) in float64."""
    pairs = []
    for logits, boxes, target in zip(
        outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True
    ):
        x, p = logits.detach().double().cpu(), boxes.detach().double().cpu()
        table = cost(x, p, target["labels"].cpu(), target["boxes"].double().cpu())
        rows, columns = scipy.optimize.linear_sum_assignment(table.numpy())
        pairs.append((torch.as_tensor(rows), torch.as_tensor(columns)))
    return pairs


def assert_pairs(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


def of_softmax(x: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    overlap = giou(*torch.broadcast_tensors(xyxy(boxes)[:, None], xyxy(targets)[None]))
    return -2 * x.softmax(-1)[:, labels] + 5 * torch.cdist(boxes, targets, 1) - 2 * overlap


def by_score(x: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    pairs = torch.broadcast_tensors(xyxy(boxes)[:, None], xyxy(targets)[None])
    return -x.sigmoid()[:, labels] * iou_union_hull(*pairs)[0] ** 1.5


def test_a_softmax_cost(backend: str, device: torch.device) -> None:
    outputs, targets = with_targets(device)
    matcher = HungarianMatcher(MATCHING_COSTS, use_focal_loss=False)
    expected = cheapest(outputs, targets, of_softmax)
    assert_pairs(matcher(outputs, targets), expected)
    # A criterion with a softmax takes it by itself.
    criterion = DetrCriterion(DETR_WEIGHTS, num_classes=CLASSES - 1, losses=["labels"])
    assert_pairs(criterion.matcher(outputs, targets), expected)
    assert not criterion.matcher.use_focal_loss


def test_from_an_epoch_on_score_and_iou_alone_count(backend: str, device: torch.device) -> None:
    outputs, targets = with_targets(device, 40, settled=False)
    how = {"change_matcher": True, "iou_order_alpha": 1.5, "matcher_change_epoch": 3}
    criterion = DetrCriterion(
        DETR_WEIGHTS, num_classes=CLASSES, matcher=HungarianMatcher(MATCHING_COSTS, **how)
    )
    plain = DetrCriterion(DETR_WEIGHTS, num_classes=CLASSES)
    before = plain.matcher(outputs, targets)
    after = cheapest(outputs, targets, by_score)
    with pytest.raises(AssertionError):
        assert_pairs(before, after)
    for epoch, expected in ((2, before), (3, after), (2, before), (7, after)):
        losses = criterion(outputs, targets, epoch=epoch, step=5, global_step=8, epoch_step=3)
        assert_pairs(criterion.matcher(outputs, targets), expected)
        same = criterion.loss_labels_vfl(outputs, targets, expected, 5)
        torch.testing.assert_close(losses["loss_vfl"], same["loss_vfl"])
    with pytest.raises(TypeError, match="forward got an unexpected argument 'epochs'"):
        criterion(outputs, targets, epochs=3)


def test_groups_are_matched_by_themselves(backend: str, device: torch.device) -> None:
    """Each as if it were a decoder of its own; in evaluation they are one."""
    outputs, targets = with_targets(device, 3 * QUERIES)
    criterion = DetrCriterion(DETR_WEIGHTS, num_classes=CLASSES, group_detr=3)
    alone = DetrCriterion(DETR_WEIGHTS, num_classes=CLASSES)
    losses, expected = criterion(outputs, targets), []
    for i in range(3):
        queries = slice(i * QUERIES, (i + 1) * QUERIES)

        def part(layer: Any, queries: slice = queries) -> Any:
            return {key: layer[key][:, queries] for key in ("pred_logits", "pred_boxes")}

        given = {**part(outputs), "aux_outputs": list(map(part, outputs["aux_outputs"]))}
        expected.append(alone(given, targets))
    for key, loss in losses.items():
        torch.testing.assert_close(loss, sum(each[key] for each in expected) / 3, msg=key)
    of_one = alone(outputs, targets)
    assert not torch.isclose(losses["loss_bbox"], of_one["loss_bbox"])
    for key, loss in criterion.eval()(outputs, targets).items():
        torch.testing.assert_close(loss, of_one[key])


def test_a_matcher_may_be_given() -> None:
    outputs, targets = with_targets(CPU)
    for criterion in (DetrCriterion, DFINECriterion):
        of_costs = criterion(DETR_WEIGHTS, num_classes=CLASSES, matcher={"cost_giou": 3})
        assert of_costs.matcher.cost_dict == {"cost_giou": 3}
        ours = of_costs.matcher
        # By the names that upstream's configurations give, in their order.
        given = criterion(
            matcher=lambda outputs, targets, ours=ours: {"indices": ours(outputs, targets)},
            weight_dict=DETR_WEIGHTS,
            losses=["vfl", "boxes"],
            alpha=0.2,
            gamma=2.0,
            num_classes=CLASSES,
        )
        found, expected = given(outputs, targets), of_costs(outputs, targets)
        for key, loss in expected.items():
            torch.testing.assert_close(found[key], loss)
    with pytest.raises(TypeError, match="group_detr > 1 needs a HungarianMatcher"):
        DetrCriterion(
            DETR_WEIGHTS, num_classes=CLASSES, group_detr=2, matcher=lambda *args: given.matcher
        )(outputs, targets)
    with pytest.raises(ValueError, match=r"6 queries are not of 4 groups \(group_detr\)"):
        DetrCriterion(DETR_WEIGHTS, num_classes=CLASSES, group_detr=4)(outputs, targets)
    with pytest.raises(ValueError, match="iou_order_alpha must not be negative, got -1"):
        HungarianMatcher(MATCHING_COSTS, iou_order_alpha=-1)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("iou_power", [-1.0, 0.0, 1.5])
def test_costs_of_a_kernel_are_the_references(
    softmax: bool, iou_power: float, backend: str, device: torch.device
) -> None:
    """More targets and classes than a program takes, labels that are none, huge logits."""
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(2, 130, 35, generator=generator) * 30 for _ in range(2))
    boxes = [0.2 + torch.rand(2, n, 4, generator=generator) / 2 for n in (130, 130, 6)]
    labels = torch.tensor([[0, 34, 35, -1, 7, 7], [1, 2, 3, 4, 5, 6]])
    params = {**MATCHING_COSTS, "alpha": 0.25, "gamma": 2.0}
    params |= {"softmax": softmax, "iou_power": iou_power}
    inputs = (logits, tuple(boxes[:2]), labels, boxes[2])
    given = mapped(lambda x: x.to(device), inputs)
    double = mapped(lambda x: x.double() if x.is_floating_point() else x, inputs)
    found = match_cost(*given, **params)
    expected = match_cost.reference(*double, **params)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_lw_detr_is_that_of_transformers(groups: int) -> None:
    loss = pytest.importorskip("transformers.loss.loss_lw_detr")
    outputs, targets = with_targets(CPU, 6)
    criterion = DetrCriterion(
        {"loss_ce": 1.0}, 0.25, num_classes=CLASSES, losses=["ia_bce", "boxes"], group_detr=groups
    )
    theirs = loss.LwDetrImageLoss(
        loss.LwDetrHungarianMatcher(2, 5, 2), CLASSES, 0.25, ["labels", "boxes"], groups
    )
    given = {"logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
    expected = theirs(given, [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets])
    losses = criterion({key: outputs[key] for key in ("pred_logits", "pred_boxes")}, targets)
    for key, value in losses.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=0, msg=key)


def test_a_softmax_matches_as_that_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.loss.loss_for_object_detection")
    outputs, targets = with_targets(CPU)
    given = {"logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    expected = theirs.HungarianMatcher(1, 5, 2)(given, labels)
    costs = {"cost_class": 1, "cost_bbox": 5, "cost_giou": 2}
    assert_pairs(HungarianMatcher(costs, use_focal_loss=False)(outputs, targets), expected)


# Boxes.


@pytest.mark.parametrize("by", ["iou", "giou"])
@pytest.mark.parametrize("choice", ["vfl", "mal", "ia_bce"])
def test_boxes_weigh_as_they_overlap(
    by: str, choice: str, backend: str, device: torch.device
) -> None:
    outputs, targets = with_targets(device, 12, settled=False)
    criterion = criterion_of(choice, boxes_weight_format=by)
    criterion.num_classes, criterion.gamma = CLASSES, 2.0
    losses = criterion({key: outputs[key] for key in ("pred_logits", "pred_boxes")}, targets)
    packed = pack(targets)
    logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"]
    matches = criterion.matcher.match(logits[None], boxes.detach()[None], packed)
    found = matched_targets(matches, packed.labels, packed.boxes)
    b = boxes.detach().double().requires_grad_()
    pairs = xyxy(b), xyxy(found.boxes[0].double())
    overlap = {"iou": iou_union_hull(*pairs)[0], "giou": giou(*pairs)}
    weight = overlap[by].detach() * found.matched[0]
    assert (weight < 0).any() or by == "iou"
    expected = 2.0 * ((1 - overlap["giou"]) * weight).sum() / 5
    torch.testing.assert_close(losses["loss_giou"].double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(losses["loss_giou"], boxes)
    (true,) = torch.autograd.grad(expected, b)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-6)
    score = weight if choice != "ia_bce" else overlap["iou"].detach() * found.matched[0]
    x = logits.double()
    q = score.unsqueeze(-1) * F.one_hot(found.labels[0].clamp(min=0), CLASSES)
    is_label = F.one_hot(found.labels[0].clamp(min=0), CLASSES) * found.matched[0].unsqueeze(-1) > 0
    target, positive, negative = {
        "vfl": (q, q, ALPHA * x.sigmoid() ** 2),
        "mal": (q**2, torch.ones_like(q), x.sigmoid() ** 2),
        "ia_bce": (
            (x.sigmoid() ** ALPHA * q.clamp(min=0) ** (1 - ALPHA)).clamp(min=0.01),
            torch.ones_like(q),
            x.sigmoid() ** 2,
        ),
    }[choice]
    each = F.softplus(x) - x * torch.where(is_label, target, 0)
    expected = 2.0 * (each * torch.where(is_label, positive, negative)).sum() / 5
    torch.testing.assert_close(
        losses[CLASS_LOSSES[choice][0]].double(), expected, rtol=1e-5, atol=1e-7
    )


def test_without_the_union_each_layer_follows_its_own(backend: str, device: torch.device) -> None:
    inputs = Inputs([2, 3], device, torch.float32)
    outputs = inputs.dfine("aux", "pre", "enc", "dn")
    criterion = DFINECriterion(
        dict.fromkeys(DFINE_WEIGHTS, 1.0), num_classes=CLASSES, reg_max=REG_MAX, use_uni_set=False
    )
    losses = criterion(outputs, inputs.targets)
    layers = {"": outputs, "_pre": outputs["pre_outputs"]}
    layers |= {f"_aux_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    layers |= {f"_enc_{i}": layer for i, layer in enumerate(outputs["enc_aux_outputs"])}
    seen = set()
    for suffix, layer in layers.items():
        given = {**layer, "up": outputs["up"], "reg_scale": outputs["reg_scale"]}
        pairs = criterion.matcher(layer, inputs.targets)
        expected = criterion.loss_boxes(given, inputs.targets, pairs, 5.0)
        if "pred_corners" in layer:
            expected |= criterion.loss_local(given, inputs.targets, pairs, 5.0)
        for key, loss in expected.items():
            torch.testing.assert_close(losses[key + suffix], loss, msg=key + suffix)
            seen.add(key + suffix)
    assert seen == {key for key in losses if "_dn" not in key and "vfl" not in key}
    assert any("ddf" in key for key in seen)
    with_union = DFINECriterion(
        dict.fromkeys(DFINE_WEIGHTS, 1.0), num_classes=CLASSES, reg_max=REG_MAX
    )(outputs, inputs.targets)
    assert not torch.isclose(with_union["loss_bbox"], losses["loss_bbox"])
    with pytest.raises(ValueError, match="boxes_weight_format must be None, 'iou' or 'giou'"):
        DFINECriterion(DFINE_WEIGHTS, boxes_weight_format="diou")
