"""The DETR family: every combination of layers, empty and crowded images, packing, the union."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from trees import Unchanged, leaves, mapped

from detloss_triton import DetrCriterion, DFINECriterion, HungarianMatcher, sum_losses
from detloss_triton.bench.batches import DECODER_EXTRAS as EXTRAS
from detloss_triton.bench.batches import Decoder
from detloss_triton.ops.matching import union_of_matches
from detloss_triton.ops.queries import bin_positions, box_bins
from detloss_triton.targets import Targets, bucket, pack
from detloss_triton.validate import validation

CPU = torch.device("cpu")
CLASSES, QUERIES, REG_MAX, GROUPS = 4, 6, 8, 2
DFINE_WEIGHTS = {
    "loss_vfl": 1.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_fgl": 0.15,
    "loss_ddf": 1.5,
}
DETR_WEIGHTS = {"loss_vfl": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


Inputs = functools.partial(
    Decoder, classes=CLASSES, queries=QUERIES, reg_max=REG_MAX, groups=GROUPS, layers=2
)


def criterion_of(name: str) -> DetrCriterion | DFINECriterion:
    """A criterion with a table of its own, as a test may write into it."""
    if name == "detr":
        return DetrCriterion(dict(DETR_WEIGHTS), num_classes=CLASSES, alpha=0.75)
    return DFINECriterion(dict(DFINE_WEIGHTS), num_classes=CLASSES, alpha=0.75, reg_max=REG_MAX)


def checked_losses(name: str, outputs: dict[str, Any], targets: Any) -> dict[str, Tensor]:
    """Losses after a step in which nothing was modified or read, and everything was connected."""
    inputs = {"outputs": outputs, "targets": targets}
    with Unchanged(inputs):
        losses = criterion_of(name)(outputs, targets)
        sum_losses(losses).backward()
    for key, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite(), key
        assert loss.requires_grad, key
    for path, x in leaves(outputs):
        if x.requires_grad:
            assert x.grad is not None and x.grad.isfinite().all(), path
            assert x.grad.dtype == x.dtype, path
    return losses


@pytest.mark.parametrize("n_extras", range(len(EXTRAS) + 1))
def test_dfine_with_and_without_each_kind_of_layer(
    n_extras: int, backend: str, device: torch.device
) -> None:
    # The interpreter takes a second a combination: one of each size there, all on torch.
    combinations = list(itertools.combinations(EXTRAS, n_extras))
    counts = [2, 3] if backend == "torch" else [2]
    for extras in combinations if backend == "torch" else combinations[:1]:
        inputs = Inputs(counts, device, torch.float32)
        losses = checked_losses("dfine", inputs.dfine(*extras), inputs.targets)
        suffixes = {key.partition("_")[2].split("_", 1)[-1] for key in losses}
        assert ("loss_vfl_aux_1" in losses) == ("aux" in extras)
        assert ("loss_vfl_pre" in losses) == ("pre" in extras)
        assert ("loss_vfl_enc_0" in losses) == ("enc" in extras)
        assert ("loss_ddf_dn_0" in losses) == ("dn" in extras)
        assert ("loss_bbox_dn_pre" in losses) == ({"dn", "dn_pre"} <= set(extras))
        assert "loss_ddf" not in losses and "loss_fgl" in losses and suffixes


@pytest.mark.parametrize("name", ["detr", "dfine"])
@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [QUERIES + 2, 1], [1]], ids=str)
def test_empty_and_crowded_images(
    name: str, counts: list[int], backend: str, device: torch.device
) -> None:
    inputs = Inputs(counts, device, torch.float32)
    extras = ("aux",) if max(counts) == 0 else ("aux", "dn")
    losses = checked_losses(name, getattr(inputs, name)(*extras), inputs.targets)
    if sum(counts) == 0:
        assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_vfl"] > 0


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_a_thousand_boxes_in_one_image(name: str, device: torch.device) -> None:
    inputs = Inputs([1000, 0], device, torch.float32)
    checked_losses(name, getattr(inputs, name)("aux"), inputs.targets)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_packed_targets_give_the_same_losses(name: str, device: torch.device) -> None:
    inputs = Inputs([2, 0, 3], device, torch.float32)
    outputs, criterion = getattr(inputs, name)(*EXTRAS), criterion_of(name)
    packed, dn_meta = criterion.prepare(inputs.targets, outputs["dn_meta"])
    listed = criterion(outputs, inputs.targets)
    prepared = criterion({**outputs, "dn_meta": dn_meta}, packed)
    assert listed.keys() == prepared.keys()
    for key, loss in listed.items():
        assert torch.equal(loss, prepared[key]), key


def test_num_boxes_may_be_passed_in(device: torch.device) -> None:
    inputs = Inputs([2, 3], device, torch.float32)
    outputs, criterion = inputs.detr("dn"), criterion_of("detr")
    counted = criterion(outputs, inputs.targets)
    halved = criterion(outputs, inputs.targets, num_boxes=10)
    for key, loss in counted.items():
        torch.testing.assert_close(halved[key] * 2, loss, rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_the_public_parts_are_those_of_the_whole(name: str, device: torch.device) -> None:
    inputs = Inputs([2, 3], device, torch.float32)
    outputs, criterion = getattr(inputs, name)(), criterion_of(name)
    whole = criterion(outputs, inputs.targets)
    indices = criterion.matcher(outputs, inputs.targets)
    parts = criterion.loss_labels_vfl(outputs, inputs.targets, indices, 5)
    parts |= criterion.loss_boxes(outputs, inputs.targets, indices, 5)
    if name == "dfine":
        parts |= criterion.loss_local(outputs, inputs.targets, indices, 5)
        parts = {key: part * DFINE_WEIGHTS[key] for key, part in parts.items()}
    assert parts.keys() == whole.keys()
    for key, loss in whole.items():
        torch.testing.assert_close(parts[key], loss, rtol=1e-6, atol=0, msg=key)


def test_losses_without_a_weight_are_dropped(device: torch.device) -> None:
    inputs = Inputs([2, 3], device, torch.float32)
    with pytest.warns(UserWarning, match="no classification loss is computed"):
        criterion = DFINECriterion({"loss_bbox": 1.0}, num_classes=CLASSES, reg_max=REG_MAX)
    assert set(criterion(inputs.dfine(), inputs.targets)) == {"loss_bbox"}


def test_errors_name_the_argument(device: torch.device) -> None:
    inputs = Inputs([2, 3], device, torch.float32)
    for name in ("detr", "dfine"):
        criterion, outputs = criterion_of(name), getattr(inputs, name)("dn")
        short = [*outputs["dn_meta"]["dn_positive_idx"]]
        short[1] = short[1][:-1]
        wrong = {**outputs, "dn_meta": {**outputs["dn_meta"], "dn_positive_idx": short}}
        with pytest.raises(ValueError, match=r"dn_positive_idx\[1\] must have 3 boxes x 2 groups"):
            criterion(wrong, inputs.targets)
        with pytest.raises(ValueError, match="dn_positive_idx"):
            criterion.get_cdn_matched_indices(wrong["dn_meta"], inputs.targets)
        with pytest.raises(ValueError, match="dn_meta"):
            criterion({k: v for k, v in outputs.items() if k != "dn_meta"}, inputs.targets)
        with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\]"):
            criterion(outputs, [{**inputs.targets[0], "boxes": torch.zeros(7, 4)}])
        with pytest.raises(ValueError, match="pred_boxes"):
            criterion({"pred_logits": outputs["pred_logits"]}, inputs.targets)
    with pytest.raises(TypeError, match="targets must be a list"):
        pack({"labels": torch.zeros(1)})
    with pytest.raises(ValueError, match="cost_dict"):
        HungarianMatcher({"cost_mask": 1.0})


# (where, the entry, its shape, what the error says): of 2 images, 6 queries, 4 classes, 9 bins.
WRONG_SHAPES = [
    ("", "pred_logits", (2, 6, 3), r"outputs pred_logits .* num_classes = 4, got \(2, 6, 3\)"),
    ("", "pred_logits", (2, 6, 5), r"outputs pred_logits .* num_classes = 4, got \(2, 6, 5\)"),
    ("", "pred_boxes", (2, 6, 3), r"outputs pred_boxes must have shape \(B, Q, 4\)"),
    ("aux_outputs", "pred_logits", (2, 6, 3), "outputs_aux_1 pred_logits .* num_classes = 4"),
    ("aux_outputs", "pred_boxes", (2, 5, 4), "outputs_aux_1 pred_boxes"),
]
WRONG_DETR_SHAPES = [
    ("dn_aux_outputs", "pred_logits", (2, 12, 5), "outputs_dn_1 pred_logits .* num_classes = 4"),
    ("dn_aux_outputs", "pred_logits", (1, 12, 4), "outputs_dn_1 pred_logits"),
    ("dn_aux_outputs", "pred_boxes", (2, 11, 4), "outputs_dn_1 pred_boxes"),
]
WRONG_DFINE_SHAPES = [
    ("", "pred_corners", (2, 6, 32), "outputs pred_corners .* 36"),
    ("", "ref_points", (2, 1, 4), "outputs ref_points"),
    ("", "ref_points", None, "outputs must have a tensor 'ref_points'"),
    ("aux_outputs", "pred_corners", (1, 6, 36), "outputs_aux_1 pred_corners"),
    ("aux_outputs", "teacher_corners", (1, 6, 36), "outputs_aux_1 teacher_corners"),
    ("aux_outputs", "teacher_corners", (2, 6, 32), "outputs_aux_1 teacher_corners"),
    ("aux_outputs", "teacher_logits", (1, 6, 4), "outputs_aux_1 teacher_logits"),
    ("aux_outputs", "teacher_logits", (2, 1, 4), "outputs_aux_1 teacher_logits"),
    ("aux_outputs", "teacher_logits", None, "outputs_aux_1 must have a tensor 'teacher_logits'"),
    ("dn_outputs", "ref_points", (1, 12, 4), "outputs_dn_1 ref_points"),
    ("dn_outputs", "pred_logits", (2, 12, 3), "outputs_dn_1 pred_logits .* num_classes = 4"),
    ("dn_outputs", "teacher_corners", (2, 1, 36), "outputs_dn_1 teacher_corners"),
]


@pytest.mark.parametrize(
    ("name", "where", "key", "shape", "message"),
    [
        *(("detr", *row) for row in WRONG_SHAPES + WRONG_DETR_SHAPES),
        *(("dfine", *row) for row in WRONG_SHAPES + WRONG_DFINE_SHAPES),
    ],
    ids=str,
)
def test_a_wrong_shape_is_refused_by_layer_and_entry(
    name: str, where: str, key: str, shape: tuple[int, ...] | None, message: str
) -> None:
    inputs = Inputs([2, 3], CPU, torch.float32)
    outputs = getattr(inputs, name)(*EXTRAS)
    layer = outputs[where][1] if where else outputs
    layer[key] = None if shape is None else torch.rand(shape)
    with pytest.raises(ValueError, match=message):
        criterion_of(name)(outputs, inputs.targets)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_packed_arguments_of_wrong_shapes_are_refused(name: str) -> None:
    inputs, criterion = Inputs([2, 3], CPU, torch.float32), criterion_of(name)
    outputs = getattr(inputs, name)(*EXTRAS)
    packed, dn_meta = criterion.prepare(inputs.targets, outputs["dn_meta"])
    assert dn_meta is not None
    positives = dn_meta["dn_positive_idx"]
    for wrong in (positives[:1], positives[..., :-1], positives[0], [*positives[:1]], [3, 4]):
        meta = {**dn_meta, "dn_positive_idx": wrong}
        with pytest.raises(ValueError, match="dn_positive_idx must have"):
            criterion({**outputs, "dn_meta": meta}, packed)
    for key in packed._fields:
        with pytest.raises(ValueError, match="Targets: "):
            criterion(outputs, packed._replace(**{key: getattr(packed, key)[:1]}))


def test_layers_without_a_teacher_are_not_distilled() -> None:
    """An entry of None is one that is not there."""
    inputs = Inputs([2, 3], CPU, torch.float32)
    outputs = inputs.dfine(*EXTRAS)
    for key in ("teacher_corners", "teacher_logits"):
        del outputs["aux_outputs"][1][key]
    absent = criterion_of("dfine")(outputs, inputs.targets)
    for key in ("teacher_corners", "teacher_logits"):
        outputs[key] = outputs["aux_outputs"][1][key] = None
    for key in ("pred_corners", "ref_points"):
        outputs["pre_outputs"][key] = None
    with validation(True):
        given = checked_losses("dfine", outputs, inputs.targets)
    assert "loss_ddf_aux_0" in given and "loss_ddf_aux_1" not in given
    assert given.keys() == absent.keys()
    for key, loss in absent.items():
        assert torch.equal(loss, given[key]), key


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_kinds_of_layers_may_be_none(name: str) -> None:
    inputs, criterion = Inputs([2, 3], CPU, torch.float32), criterion_of(name)
    outputs = getattr(inputs, name)()
    kinds = ("aux_outputs", "pre_outputs", "enc_aux_outputs", "dn_aux_outputs", "dn_outputs")
    none = dict.fromkeys((*kinds, "dn_pre_outputs", "dn_meta"))
    assert criterion({**outputs, **none}, inputs.targets) == criterion(outputs, inputs.targets)


@pytest.mark.parametrize("name", ["detr", "dfine"])
@pytest.mark.parametrize("counts", [[0, 0], [0, 3]], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["listed", "packed"])
def test_denoising_without_a_group(
    name: str, counts: list[int], packed: bool, backend: str, device: torch.device
) -> None:
    inputs = Inputs(counts, device, torch.float32)
    outputs = getattr(inputs, name)("aux")
    layers = [inputs.layer(0, corners=name == "dfine") for _ in range(2)]
    outputs["dn_aux_outputs" if name == "detr" else "dn_outputs"] = layers
    none = torch.zeros(0, dtype=torch.int64, device=device)
    outputs["dn_meta"] = {"dn_positive_idx": [none, none], "dn_num_group": 0}
    targets: Any = inputs.targets
    if packed:
        targets, outputs["dn_meta"] = criterion_of(name).prepare(targets, outputs["dn_meta"])
    losses = checked_losses(name, outputs, targets)
    denoising = {key: loss for key, loss in losses.items() if "_dn_" in key}
    assert "loss_vfl_dn_1" in denoising and "loss_giou_dn_1" in denoising
    assert all(loss == 0 for loss in denoising.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_teachers_and_references_in_half_are_computed_in_float32(dtype: torch.dtype) -> None:
    """What is no leaf is in half as well: the losses of the same numbers in float32."""
    inputs = Inputs([2, 3], CPU, dtype)
    half = mapped(
        lambda _, x: x.to(dtype) if x.is_floating_point() else x,
        {"outputs": inputs.dfine(*EXTRAS), "targets": inputs.targets},
    )
    single = mapped(lambda _, x: x.float() if x.is_floating_point() else x, half)
    losses, expected = (criterion_of("dfine")(**arguments) for arguments in (half, single))
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-5, atol=0, msg=key)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_losses_may_be_modified_in_place(name: str) -> None:
    inputs = Inputs([2, 3], CPU, torch.float32)
    outputs, criterion = getattr(inputs, name)(*EXTRAS), criterion_of(name)
    leaf = outputs["pred_logits"]
    losses = criterion(outputs, inputs.targets)
    expected = 2 * sum_losses(losses)
    (gradient,) = torch.autograd.grad(expected, leaf)
    losses = criterion(outputs, inputs.targets)
    for key in losses:
        losses[key] *= 2
    total = losses.pop("loss_vfl")
    for loss in losses.values():
        total += loss
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], gradient)


@pytest.mark.parametrize(
    ("criterion", "method"),
    [
        *((DetrCriterion, m) for m in ("loss_labels_vfl", "loss_boxes")),
        *((DFINECriterion, m) for m in ("loss_labels_vfl", "loss_boxes", "loss_local", "fgl_loss")),
        (DetrCriterion, "get_cdn_matched_indices"),
    ],
)
def test_an_override_that_would_not_be_called_is_refused(criterion: type, method: str) -> None:
    def own(*arguments: Any) -> dict[str, Tensor]:
        return {}

    with pytest.raises(TypeError, match=f"Own overrides {method}, which forward does not call"):
        type("Own", (criterion,), {method: own})
    mixin = type("Mixin", (), {method: own})
    with pytest.raises(TypeError, match=f"Own overrides {method}"):
        type("Own", (mixin, criterion), {})


def test_a_subclass_with_a_forward_of_its_own_may_override() -> None:
    class Layerwise(DetrCriterion):
        def forward(self, outputs: Any, targets: Any, num_boxes: Any = None) -> Any:
            if num_boxes is None:
                return super().forward(outputs, targets)
            indices = self.matcher(outputs, targets)
            return self.loss_boxes(outputs, targets, indices, num_boxes)

        def loss_boxes(self, *arguments: Any) -> dict[str, Tensor]:
            return {key: loss * 10 for key, loss in super().loss_boxes(*arguments).items()}

    class Scaled(DetrCriterion):
        def forward(self, *arguments: Any) -> dict[str, Tensor]:
            return {key: loss * 10 for key, loss in super().forward(*arguments).items()}

    inputs = Inputs([2, 3], CPU, torch.float32)
    outputs = inputs.detr()
    expected = criterion_of("detr")(outputs, inputs.targets)
    layerwise = Layerwise(DETR_WEIGHTS, num_classes=CLASSES, alpha=0.75)
    scaled = Scaled(DETR_WEIGHTS, num_classes=CLASSES, alpha=0.75)
    for losses in (layerwise(outputs, inputs.targets, 5), scaled(outputs, inputs.targets)):
        torch.testing.assert_close(losses["loss_bbox"], 10 * expected["loss_bbox"])
    # The library's forward would not call it.
    with pytest.raises(TypeError, match="Layerwise overrides loss_boxes"):
        layerwise(outputs, inputs.targets)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_a_matcher_is_called_or_refused(name: str) -> None:
    class Own(HungarianMatcher):
        def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
            return torch.full(logits.shape[:3], -1)

    class OwnForward(HungarianMatcher):
        def forward(self, outputs: Any, targets: Any) -> Any:
            return []

    inputs, criterion = Inputs([2, 3], CPU, torch.float32), criterion_of(name)
    arguments = getattr(inputs, name)("aux"), inputs.targets
    criterion.matcher = Own({"cost_class": 1})
    assert criterion(*arguments)["loss_bbox"] == 0
    criterion.matcher = OwnForward({"cost_class": 1})
    with pytest.raises(ValueError, match=r"matcher OwnForward, layer last: .* got 0 of them"):
        criterion(*arguments)
    # It is called as OTX calls it, with two arguments.
    criterion.matcher = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"Identity.*takes 2 positional arguments but 3"):
        criterion(*arguments)


def test_the_matcher_answers_as_its_users_expect(backend: str, device: torch.device) -> None:
    inputs = Inputs([3, 0, QUERIES + 4], device, torch.float32)
    pairs = HungarianMatcher({"cost_class": 2, "cost_bbox": 5, "cost_giou": 2})(
        inputs.layer(), inputs.targets
    )
    for (queries, found), n in zip(pairs, inputs.counts, strict=True):
        assert queries.dtype == found.dtype == torch.int64
        assert len(queries) == len(found) == min(n, QUERIES)
        assert queries.tolist() == sorted(set(queries.tolist()))
        assert len(set(found.tolist())) == len(found) and all(0 <= t < n for t in found.tolist())


def test_union_of_matches_breaks_ties_as_written() -> None:
    generator = torch.Generator().manual_seed(0)
    n_targets = 5
    matches = torch.randint(-1, n_targets, (4, 3, 30), generator=generator)
    (union,) = union_of_matches(matches, n_targets=n_targets)
    for image in range(3):
        counts: dict[tuple[int, int], int] = {}
        for layer in range(4):
            for query, target in enumerate(matches[layer, image].tolist()):
                if target >= 0:
                    counts[query, target] = counts.get((query, target), 0) + 1
        expected = [-1] * 30
        for (query, target), _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
            if expected[query] < 0:
                expected[query] = target
        assert union[image].tolist() == expected


def test_box_bins_are_the_last_below_and_saturate() -> None:
    positions = bin_positions(REG_MAX, torch.tensor([0.5]), torch.tensor([4.0]))
    assert positions[REG_MAX // 2] == 0 and (positions.diff() > 0).all()
    assert positions[0] == -4 and positions[-1] == 4
    points = torch.tensor([0.5, 0.5, 0.2, 0.2]).view(1, 1, 1, 4)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 3.0, 3.0], [0.9, 0.5, 0.2, 0.2]])
    left, right = box_bins(
        points.expand(1, 1, 3, 4), boxes.view(1, 1, 3, 4), positions, torch.tensor([4.0])
    )
    distances = positions[left] + right * (positions[left + 1] - positions[left])
    # A box on its reference has distance 0 on all sides; one far larger saturates at the last bin.
    torch.testing.assert_close(distances[0, 0, 0], torch.zeros(4), rtol=0, atol=1e-5)
    assert (left[0, 0, 1] == REG_MAX - 1).all() and (right[0, 0, 1] == 1).all()
    assert left[0, 0, 2, 0] == 0 or right[0, 0, 2, 0] == 0  # the left side lies to the right


def test_buckets_are_few_and_close() -> None:
    sizes = [bucket(n) for n in range(1, 5001)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n >= 8)
    assert len(set(sizes)) <= 20


def test_packing_pads_with_nothing() -> None:
    inputs = Inputs([2, 0, 9], torch.device("cpu"), torch.float32)
    packed = pack(inputs.targets)
    assert isinstance(packed, Targets) and packed.labels.shape == (3, 12)
    assert packed.counts.tolist() == [2, 0, 9]
    for i, target in enumerate(inputs.targets):
        n = len(target["labels"])
        assert torch.equal(packed.labels[i, :n], target["labels"])
        assert torch.equal(packed.boxes[i, :n], target["boxes"])
        assert (packed.labels[i, n:] == -1).all() and (packed.boxes[i, n:] == 0).all()
    assert pack(packed) is packed


def test_sum_losses_takes_nested_lists() -> None:
    one = torch.ones((), requires_grad=True)
    losses = {"a": [one, 2 * one], "b": {"c": (3 * one).expand(2)}, "total_loss": 100 * one}
    total = sum_losses(losses)
    assert total == 9
    total.backward()
    assert one.grad == 9
    with pytest.raises(ValueError, match="no tensor"):
        sum_losses({})
