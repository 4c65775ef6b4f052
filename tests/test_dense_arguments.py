"""What ATSS, RTMDet, SSD and YOLOX take beside the shapes of test_shapes.py: lists of images,
divisors, tensors of other devices, targets that require gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trees import leaves, mapped, mixed

import detloss_triton as dt
from detloss_triton.bench.batches import DENSE as BUILDERS

CPU, META = torch.device("cpu"), torch.device("meta")
DENSE = ("atss", "rtmdet", "ssd", "yolox")
PER_IMAGE = (
    "cls_score",
    "bbox_pred",
    "anchor",
    "labels",
    "label_weights",
    "bbox_targets",
    "bbox_weights",
)
DIVISORS = [("atss", "avg_factor"), ("ssd", "avg_factor"), ("yolox", "num_total_samples")]


def step(name: str, inputs: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """({path: loss}, {path: gradient}) by the predictions."""
    batch = BUILDERS[name]().on(CPU)
    batch.inputs.update(inputs)
    losses = batch.make(**settings)(**batch.inputs)
    mixed(losses).backward()
    return dict(leaves(losses)), {path: x.grad for path, x in batch.leaves().items()}


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("argument", [*PER_IMAGE, "all"])
@pytest.mark.parametrize("decoded", [False, True])
def test_ssd_takes_a_tensor_of_each_image(kind: Any, argument: str, decoded: bool) -> None:
    """In any argument: OTX's head has a list of anchors."""
    batches = [BUILDERS["ssd"]().on(CPU) for _ in range(2)]
    inputs = dict(batches[1].inputs)
    for name in PER_IMAGE if argument == "all" else [argument]:
        inputs[name] = kind(inputs[name])
    ours = batches[0].make(reg_decoded_bbox=decoded)(**batches[0].inputs)
    theirs = batches[1].make(reg_decoded_bbox=decoded)(**inputs)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    for losses in (ours, theirs):
        mixed(losses).backward()
    for path, x in batches[0].leaves().items():
        torch.testing.assert_close(batches[1].leaves()[path].grad, x.grad, rtol=0, atol=0)


@pytest.mark.parametrize("decoded", [False, True])
def test_ssd_takes_anchors_of_all_images(decoded: bool) -> None:
    anchors = BUILDERS["ssd"]().inputs["anchor"][0]
    found = [
        step("ssd", {"anchor": anchor}, reg_decoded_bbox=decoded)
        for anchor in (anchors, [anchors, anchors])
    ]
    torch.testing.assert_close(*found)


def test_ssd_names_the_image_of_a_list() -> None:
    batch = BUILDERS["ssd"]()
    anchors = batch.inputs["anchor"]
    for wrong, kind, message in (
        ([anchors[0], anchors[1][:-1]], ValueError, r"anchor, image 1 must have shape \(A, 4\)"),
        ([anchors[0], None], TypeError, "anchor, image 1 must be a tensor, got NoneType"),
        ([anchors[0]], ValueError, r"anchor must have shape \(N, A, 4\) = \(2, 150, 4\)"),
        ([], TypeError, "anchor must be a tensor, got list"),
        ([anchors[0], anchors[1].to(META)], ValueError, "anchor, image 1 must be on cpu"),
    ):
        with pytest.raises(kind, match=f"^SSDCriterion: {message}"):
            batch.make()(**{**batch.inputs, "anchor": wrong})


@pytest.mark.parametrize(("name", "argument"), DIVISORS)
@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [
        ("3", TypeError, "a number, got str"),
        (True, TypeError, "a number, got bool"),
        (np.bool_(True), TypeError, "a number, got bool"),
        (None, TypeError, "a number, got NoneType"),
        ([3.0], TypeError, "a number, got list"),
        (torch.tensor(True), TypeError, "a number, got a tensor of torch.bool"),
        (torch.tensor(1j), TypeError, "a number, got a tensor of torch.complex64"),
        (torch.ones(2), ValueError, r"one number, got shape \(2,\)"),
        (torch.ones(2, 1), ValueError, r"one number, got shape \(2, 1\)"),
        (torch.ones(0), ValueError, r"one number, got shape \(0,\)"),
        (torch.ones((), device=META), ValueError, "on cpu, got meta"),
    ],
    ids=str,
)
def test_what_is_no_divisor_is_refused(
    name: str, argument: str, value: Any, kind: type[Exception], got: str
) -> None:
    batch = BUILDERS[name]()
    with pytest.raises(kind, match=rf"^\w+Criterion: {argument} must be {got}"):
        batch.make()(**{**batch.inputs, argument: value})


@pytest.mark.parametrize(("name", "argument"), DIVISORS)
def test_divisors_are_numbers_or_tensors_of_one(name: str, argument: str) -> None:
    expected = step(name, {argument: 3.0})
    for value in (3, np.float32(3), np.int64(3), torch.tensor(3), torch.tensor([3.0])):
        torch.testing.assert_close(step(name, {argument: value}), expected)
    wanted = torch.tensor(3.0, requires_grad=True)
    losses, gradients = step(name, {argument: wanted})
    assert gradients.pop(argument) is None
    torch.testing.assert_close((losses, gradients), expected)


def arguments() -> Iterator[tuple[str, str]]:
    """(criterion, path) of each tensor of a batch; of levels, the second."""
    for name in DENSE:
        for path, _ in leaves(BUILDERS[name]().inputs):
            argument, _, level = path.partition(".")
            if level in ("", "1") and argument not in ("num_pos", "num_total_samples"):
                yield name, path


@pytest.mark.parametrize(("name", "path"), list(arguments()))
def test_devices_that_do_not_go_together_are_named(name: str, path: str) -> None:
    """By criterion, level and argument; `meta` stands for a device."""
    batch = BUILDERS[name]()
    inputs = mapped(lambda here, x: x.to(META) if here == path else x, batch.inputs)
    with pytest.raises(ValueError) as error:
        batch.make()(**inputs)
    place = type(batch.make()).__name__ + (", level 1" if path.endswith(".1") else "")
    argument = path.partition(".")[0]
    message = str(error.value)
    assert message.startswith(f"{place}: "), message
    assert "must be on" in message and {"cpu", "meta"} <= set(message.replace(",", "").split())
    # What says where the others must be is named as that.
    assert argument in message, message


def test_levels_are_on_one_device() -> None:
    batch = BUILDERS["atss"]()
    inputs = mapped(lambda path, x: x.to(META) if path.endswith(".2") else x, batch.inputs)
    with pytest.raises(ValueError, match="level 2: labels must be on cpu as the labels are, got m"):
        batch.make()(**inputs)


def test_targets_of_nothing_may_be_on_any_device() -> None:
    """As YOLOX's are, where a head collects them in a loop over images without an object."""
    batch = BUILDERS["yolox"](positives=0.0)
    expected = batch.make()(**batch.inputs)
    empty = {key: batch.inputs[key].to(META) for key in ("cls_targets", "bbox_targets")}
    torch.testing.assert_close(batch.make()(**{**batch.inputs, **empty}), expected)


class Seeing(nn.Module):
    """Whatever it is called with, predictions aside, requires no gradient."""

    use_sigmoid = True

    def forward(self, pred: Tensor, *rest: Any, valid_label_mask: Any = None, **named: Any) -> Any:
        assert pred.requires_grad
        tree = {"rest": list(rest), "mask": valid_label_mask, **named}
        assert not any(x.requires_grad for _, x in leaves(tree))
        self.seen = True
        return pred.sum()


SLOTS = {
    "atss": ("loss_cls", "loss_bbox", "loss_centerness"),
    "rtmdet": ("loss_cls", "loss_bbox"),
    "ssd": (),
    "yolox": ("loss_cls", "loss_bbox", "loss_obj", "loss_l1"),
}
PREDICTIONS = ("cls_score", "bbox_pred", "centerness", "flatten_")


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("strangers", [False, True])
def test_targets_and_weights_are_detached(name: str, strangers: bool, backend: str) -> None:
    """Losses and gradients are as without; no gradient reaches what is no prediction."""
    plain, wanting = BUILDERS[name]().on(CPU), BUILDERS[name]().on(CPU)

    def asked(path: str, x: Tensor) -> Tensor:
        if path.startswith(PREDICTIONS) or not x.is_floating_point():
            return x
        return x.detach().clone().requires_grad_()

    inputs = {
        key: torch.tensor(float(x)) if key == "avg_factor" else x
        for key, x in wanting.inputs.items()
    }
    inputs = mapped(asked, inputs)
    targets = [
        x for path, x in leaves(inputs) if x.requires_grad and not path.startswith(PREDICTIONS)
    ]
    assert targets
    seeing = {slot: Seeing() for slot in SLOTS[name]} if strangers else {}
    settings = {"reg_decoded_bbox": True} if name == "ssd" else {}
    found = []
    for batch, given in ((plain, plain.inputs), (wanting, inputs)):
        losses = batch.make(**settings, **seeing)(**given)
        mixed(losses).backward()
        found.append((dict(leaves(losses)), {p: x.grad for p, x in batch.leaves().items()}))
    torch.testing.assert_close(*found)
    assert all(x.grad is None for x in targets)
    assert all(module.seen for module in seeing.values())


def test_strides_may_be_arrays() -> None:
    strides = [np.array([s, s]) for s in (8, 16, 32)]
    torch.testing.assert_close(step("rtmdet", {"stride": strides}), step("rtmdet", {}))


@pytest.mark.parametrize("ratio", [-1, 0.5, "3", True])
def test_ssd_ratio_is_a_count(ratio: Any) -> None:
    with pytest.raises(ValueError, match="neg_pos_ratio must be an integer, at least 0, got"):
        dt.SSDCriterion(5, neg_pos_ratio=ratio)
