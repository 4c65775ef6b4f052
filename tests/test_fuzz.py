"""Random batches of the seven criteria: what must not change does not, and no input breaks them.

`--fuzz-minutes N` goes on for N minutes in all, with random seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing import NAMES, SET_CRITERIA, Case, case, images_of, property_of
from hypothesis import strategies as st
from machine import DEVICE
from test_bounds import surrounded
from test_criteria import assert_same
from torch import Tensor

from detloss_triton import use_backend

# Float32 sums in another order, of values of both signs.
ORDER = 1e-5
seeds = st.integers(0, 2**20)
counts = st.lists(st.integers(0, 6), min_size=1, max_size=4)
classes = st.sampled_from([1, 2, 7])


def images_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def expanded(x: Tensor) -> Tensor:
    """The first image for all of them, without a copy."""
    return x[:1].expand(x.shape) if x.dim() > 2 and len(x) else x


LAYOUTS: list[Callable[[Tensor], Tensor]] = [images_last, channels_last, surrounded, expanded]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def agree(ours: Case, theirs: Case, tolerance: float, backend: Any = "torch") -> None:
    """Losses and gradients of a case under a backend are those of another in torch."""
    with use_backend(backend):
        losses, gradients = ours.step()
    with use_backend("torch"):
        expected_losses, expected_gradients = theirs.step()
    assert_same(losses, expected_losses, tolerance)
    assert all(gradients[path].dtype == x.dtype for path, x in ours.leaves().items())
    half = max((torch.finfo(g.dtype).eps for g in gradients.values()), default=0.0)
    for path, gradient in gradients.items():
        # What is beyond the largest half is infinite, as it must be: a GradScaler looks for it.
        largest = torch.finfo(gradient.dtype).max
        gradients[path] = gradient.nan_to_num(math.nan, largest, -largest)
        expected_gradients[path] = expected_gradients[path].clamp(-largest, largest)
    assert_same(gradients, expected_gradients, max(10 * tolerance, half))


def placed(drawn: Case, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Case:
    """The tensors of two or more dimensions laid out in memory; the leaves in a dtype."""
    by_path = drawn.leaves()

    def change(path: str, x: Tensor) -> Tensor:
        x = x.to(dtype) if path in by_path else x
        return layout(x) if x.dim() > 1 else x

    return drawn.changed(change)


def plain(drawn: Case) -> Case:
    by_path = drawn.leaves()
    return drawn.changed(lambda path, x: (x.float() if path in by_path else x).contiguous())


@property_of(
    6,
    seed=seeds,
    counts=counts,
    classes=classes,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_memory_layout_and_dtype_change_nothing(
    name: str, seed: int, counts: list[int], classes: int, layout: Any, dtype: torch.dtype
) -> None:
    drawn = placed(case(name, seed, counts, classes, extras=("aux", "dn")), layout, dtype)
    agree(drawn, plain(drawn), ORDER)


@pytest.mark.usefixtures("kernels")
@property_of(
    1,
    seed=seeds,
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_kernels_agree(
    name: str, seed: int, counts: list[int], layout: Any, dtype: torch.dtype
) -> None:
    drawn = placed(case(name, seed, counts, 3, device=DEVICE), layout, dtype)
    agree(drawn, plain(drawn), ORDER, "triton")


@property_of(6, seed=seeds, counts=counts, random=st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(
    name: str, seed: int, counts: list[int], random: Any
) -> None:
    drawn = case(name, seed, counts, extras=("aux", "dn"))
    order = list(range(len(counts)))
    random.shuffle(order)
    inverse = [order.index(i) for i in range(len(order))]
    losses, gradients = drawn.step()
    shuffled_losses, shuffled_gradients = images_of(drawn, order).step()
    if name == "ssd":
        # One loss per image: they move with the images.
        shuffled_losses = {
            f"{key}.{i}": shuffled_losses[f"{key}.{inverse[i]}"]
            for key in ("loss_cls", "loss_bbox")
            for i in range(len(order))
        }
    assert_same(shuffled_losses, losses, ORDER)
    back_again = {path: g[torch.tensor(inverse)] for path, g in shuffled_gradients.items()}
    assert_same(back_again, gradients, 10 * ORDER)


@property_of(6, seed=seeds, counts=counts, random=st.randoms(use_true_random=False))
def test_the_order_of_boxes_does_not_matter(
    name: str, seed: int, counts: list[int], random: Any
) -> None:
    """Of an image; where the criterion sees boxes, and not anchors that were given theirs."""
    if name not in (*SET_CRITERIA, "yolov9"):
        return
    # One layer: ties in D-FINE's union of the matches of several go to the lower target.
    drawn = case(name, seed, counts, extras=("dn",))
    losses, gradients = drawn.step()
    if name == "yolov9":
        targets = drawn.inputs["targets"]
        order = list(range(targets.shape[1]))
        random.shuffle(order)
        drawn.inputs["targets"] = targets[:, order]
    else:
        meta = drawn.inputs["outputs"].get("dn_meta")
        for image, target in enumerate(drawn.inputs["targets"]):
            order = list(range(len(target["labels"])))
            random.shuffle(order)
            drawn.inputs["targets"][image] = {key: x[order] for key, x in target.items()}
            if meta is not None:
                queries = meta["dn_positive_idx"][image].view(meta["dn_num_group"], -1)
                meta["dn_positive_idx"][image] = queries[:, order].flatten()
    shuffled_losses, shuffled_gradients = drawn.step()
    assert_same(shuffled_losses, losses, ORDER)
    assert_same(shuffled_gradients, gradients, 10 * ORDER)


@property_of(4, seed=seeds, counts=counts, factor=st.sampled_from([0.0, 0.37, 3.0]))
def test_loss_weights_scale_losses_and_gradients(
    name: str, seed: int, counts: list[int], factor: float
) -> None:
    if name == "ssd":
        return  # has no loss weights
    losses, gradients = case(name, seed, counts).step()
    scaled_losses, scaled_gradients = case(name, seed, counts, factor=factor).step()
    assert_same(scaled_losses, {k: factor * v for k, v in losses.items()}, ORDER)
    assert_same(scaled_gradients, {k: factor * v for k, v in gradients.items()}, ORDER)


# Losses that anchors and queries without an object add to.
OF_BACKGROUND = re.compile("loss_cls|loss_obj|loss_vfl|total_loss")


def emptied(drawn: Case) -> Case:
    """Without the objects of the last image."""
    inputs = drawn.inputs
    if drawn.name == "yolov9":
        inputs["targets"][-1, :, 0] = -1
    elif drawn.name == "yolox":
        n_anchors = inputs["flatten_objectness"].shape[1]
        kept = int(inputs["pos_masks"][:-n_anchors].sum())
        inputs["pos_masks"][-n_anchors:] = False
        inputs["obj_targets"][-n_anchors:] = 0
        for key in ("cls_targets", "bbox_targets", "l1_targets"):
            inputs[key] = inputs[key][:kept]
    elif drawn.name not in SET_CRITERIA:
        for key, value in (("labels", 3), ("assign_metrics", 0), ("bbox_weights", 0)):
            levels = inputs.get(key, [])
            for level in [levels] if isinstance(levels, Tensor) else levels:
                level[-1] = value
    return drawn


@property_of(6, seed=seeds, counts=counts)
def test_an_empty_image_adds_background_only(name: str, seed: int, counts: list[int]) -> None:
    """The other images' gradients stay, as do all losses that background has no part in.

    D-FINE's distillation is left out: its two means weigh by how many queries have no box.
    """
    drawn = emptied(case(name, seed, [*counts, 0], extras=("aux", "dn")))
    if name == "dfine":
        drawn.criterion.weight_dict.pop("loss_ddf")
    if name == "yolov9" and not any(counts):
        return
    others = images_of(drawn, range(len(counts)))
    losses, gradients = drawn.step()
    expected_losses, expected_gradients = others.step()
    for path, loss in expected_losses.items():
        if OF_BACKGROUND.search(path):
            assert losses[path] >= loss * (1 - ORDER)
        else:
            torch.testing.assert_close(losses[path], loss, rtol=ORDER, atol=1e-7, msg=path)
    assert_same({k: g[:-1] for k, g in gradients.items()}, expected_gradients, 10 * ORDER)


over_criteria = pytest.mark.parametrize("name", NAMES)


def over_values(first: Any, *others: Any) -> pytest.MarkDecorator:
    """Every value on the torch backend; the first on both, for the interpreter takes its time."""
    runs = [("torch", first), ("triton", first), *(("torch", value) for value in others)]
    return pytest.mark.parametrize(("backend", "value"), runs, indirect=["backend"], ids=str)


PREDICTED_BOXES = re.compile(r"bbox|pred_boxes|preds\.\d\.2")
PREDICTED_CLASSES = re.compile(r"cls_(score|preds)|objectness|pred_logits|preds\.\d\.0")


def target_boxes(path: str, x: Tensor) -> Tensor | None:
    """A view of the boxes of an argument that holds them."""
    if path == "targets":
        return x[..., 1:]
    return x if re.search(r"bbox_targets|targets.\d+.boxes", path) else None


def assert_finite(drawn: Case) -> None:
    losses, gradients = drawn.step()
    for path, x in (*losses.items(), *gradients.items()):
        assert x.isfinite().all(), path


@over_criteria
@over_values(math.nan, math.inf, -math.inf)
def test_fault_class_prediction_not_finite(
    name: str, value: float, backend: str, device: torch.device
) -> None:
    """A NaN shows in the loss, so that a GradScaler skips the step."""

    def hit(path: str, x: Tensor) -> Tensor:
        x = x.clone()
        if PREDICTED_CLASSES.search(path):
            x[0, 0] = value
        elif path.startswith("label_weights"):
            x.fill_(1)
        return x

    losses, _ = case(name, device=device).changed(hit).step()
    if math.isnan(value):
        assert any(not loss.isfinite().all() for loss in losses.values())


@over_criteria
@over_values(math.nan, math.inf, 1e30)
def test_fault_box_prediction_not_finite(
    name: str, value: float, backend: str, device: torch.device
) -> None:
    def hit(path: str, x: Tensor) -> Tensor:
        x = x.clone()
        if PREDICTED_BOXES.search(path) and "target" not in path and x.dim() > 2:
            x[0, 0] = value
        return x

    case(name, device=device).changed(hit).step()


@over_criteria
def test_fault_boxes_of_no_size(name: str, backend: str, device: torch.device) -> None:
    """Targets and predictions that are points."""

    def shrink(path: str, x: Tensor) -> Tensor:
        x = x.clone()
        boxes = target_boxes(path, x)
        if boxes is not None:
            boxes[..., 2:] = 0 if name in SET_CRITERIA else boxes[..., :2]
        elif path.endswith("pred_boxes"):
            x[..., 2:] = 0
        elif re.search(r"preds\.\d\.2", path):
            x.zero_()
        elif path == "flatten_bboxes" or (name == "rtmdet" and "bbox_pred" in path):
            x[..., 2:] = x[..., :2]
        return x

    assert_finite(case(name, device=device).changed(shrink))


@over_criteria
@over_values(1e6, 1e30)
def test_fault_huge_coordinates(
    name: str, value: float, backend: str, device: torch.device
) -> None:
    """Finite as long as areas are; beyond, nothing breaks."""

    def grow(path: str, x: Tensor) -> Tensor:
        x = x.clone()
        boxes = target_boxes(path, x)
        if boxes is not None:
            boxes *= value
        elif path == "flatten_bboxes" or (name == "rtmdet" and "bbox_pred" in path):
            x *= value
        return x

    drawn = case(name, device=device).changed(grow)
    if value < 1e10:
        assert_finite(drawn)
    else:
        drawn.step()


@over_criteria
@pytest.mark.parametrize("label", [-1, -7, 3, 4, 5, 10**4, 2**31, 2**40, -(2**40)], ids=str)
def test_fault_labels_out_of_range(name: str, label: int) -> None:
    """Background, or no match; the kernels: test_bounds.py."""

    def mislabel(path: str, x: Tensor) -> Tensor:
        x = x.clone()
        if re.search("labels", path) and not x.is_floating_point():
            x[x < 3] = label
        elif path == "targets":
            x[..., 0] = label
        return x

    with use_backend("torch"):
        assert_finite(case(name).changed(mislabel))


@over_criteria
def test_fault_no_images(name: str, backend: str, device: torch.device) -> None:
    if name in SET_CRITERIA:
        with pytest.raises(ValueError, match="targets must hold one dictionary per image"):
            given = case(name, device=device)
            given.criterion(given.inputs["outputs"], [])
    elif name == "ssd":
        empty = case(name, counts=[], device=device)
        assert empty.criterion(**empty.inputs) == {"loss_cls": [], "loss_bbox": []}
    else:
        assert_finite(case(name, counts=[], device=device))


@over_criteria
@over_values([0, 14], [0], [0, 0], [1], [1, 0])
def test_fault_none_one_or_many_boxes(
    name: str, value: list[int], backend: str, device: torch.device
) -> None:
    assert_finite(case(name, counts=value, device=device))


@over_criteria
def test_fault_duplicate_boxes(name: str, backend: str, device: torch.device) -> None:
    """All targets of an image are one, and so are all predictions."""

    def repeat(path: str, x: Tensor) -> Tensor:
        if name == "yolox" and not path.startswith("flatten"):
            of_positives = path.endswith("_targets") and x.shape[1] > 1
            return x[:1].expand(x.shape).clone() if of_positives else x
        is_target = target_boxes(path, x) is not None or path.endswith(".labels")
        if is_target and name in SET_CRITERIA:
            return x[:1].expand(x.shape).clone()
        if x.dim() > 2:
            return x[:, :1].expand(x.shape).clone()
        return x

    assert_finite(case(name, device=device).changed(repeat))
