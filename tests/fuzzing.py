"""Batches of all seven criteria to draw from, and properties checked on what is drawn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import CPU
from test_criteria import made
from test_detr import DETR_WEIGHTS, DFINE_WEIGHTS, REG_MAX, Inputs
from torch import Tensor, nn
from trees import leaves, mapped

import detloss_triton as dt
from detloss_triton.bench.batches import DENSE as BUILDERS

SET_CRITERIA = ("detr", "dfine")
NAMES = (*BUILDERS, *SET_CRITERIA)
# Anchors of 8, 16 and 32 pixels: 16 + 4 + 1 of them, few enough for the interpreter.
SIZE = 32
_n_properties = 0


@dataclass(frozen=True)
class Case:
    """A criterion and the arguments of its forward."""

    name: str
    criterion: nn.Module
    inputs: dict[str, Any]

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Case:
        """With other values in place of the tensors; leaves stay leaves."""

        def leaf(path: str, x: Tensor) -> Tensor:
            return change(path, x.detach()).detach().requires_grad_(x.requires_grad)

        return dataclasses.replace(self, inputs=mapped(leaf, self.inputs))

    def leaves(self) -> dict[str, Tensor]:
        return {path: x for path, x in leaves(self.inputs) if x.requires_grad}

    def step(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({path: loss}, {path: gradient}) of the sum of the losses; all must be connected."""
        losses = dict(leaves(self.criterion(**self.inputs)))
        inputs = self.leaves()
        assert losses and all(loss.requires_grad for loss in losses.values()), "not connected"
        total = dt.sum_losses(losses)
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        by_path = {
            path: torch.zeros_like(x) if gradient is None else gradient
            for (path, x), gradient in zip(inputs.items(), gradients, strict=True)
        }
        return {path: loss.detach() for path, loss in losses.items()}, by_path


def case(
    name: str,
    seed: int = 0,
    counts: Sequence[int] = (3, 2),
    classes: int = 3,
    factor: float = 1.0,
    extras: Sequence[str] = ("aux",),
    device: torch.device = CPU,
) -> Case:
    """A batch of len(counts) images; the dense criteria have no objects where all counts are 0.

    Args:
        factor: of every loss weight the criterion has.
    """
    if name in SET_CRITERIA:
        inputs = Inputs(list(counts), device, torch.float32)
        inputs.generator.manual_seed(seed)
        used = [extra for extra in extras if max(counts, default=0) or "dn" not in extra]
        outputs = getattr(inputs, name)(*used)
        weights = DETR_WEIGHTS if name == "detr" else DFINE_WEIGHTS
        weights = {key: factor * weight for key, weight in weights.items()}
        criterion: nn.Module = (
            dt.DetrCriterion(weights, num_classes=4)
            if name == "detr"
            else dt.DFINECriterion(weights, num_classes=4, reg_max=REG_MAX)
        )
        return Case(name, criterion, {"outputs": outputs, "targets": inputs.targets})
    sizes: dict[str, Any] = {"anchors": 30} if name in ("ssd", "yolox") else {"size": SIZE}
    share = 0.3 if max(counts, default=0) else 0.0
    batch = BUILDERS[name](seed, max(len(counts), 1), classes, share, **sizes).on(device)
    batch_case = Case(name, made(batch, device, **_slots(name, factor)), batch.inputs)
    if name == "yolov9":
        targets = batch.inputs["targets"]
        for image, count in enumerate(counts):
            targets[image, min(count, targets.shape[1]) :, 0] = -1
    return batch_case if len(counts) else images_of(batch_case, [])


def _slots(name: str, factor: float) -> dict[str, Any]:
    """The loss modules of the builders' criteria, with their weights times a factor."""
    bce = {"use_sigmoid": True, "loss_weight": factor}
    if name == "atss":
        return {
            "loss_cls": dt.CrossSigmoidFocalLoss(loss_weight=factor),
            "loss_bbox": dt.GIoULoss(loss_weight=2 * factor),
            "loss_centerness": dt.CrossEntropyLoss(**bce),
        }
    if name == "rtmdet":
        return {
            "loss_cls": dt.QualityFocalLoss(loss_weight=factor),
            "loss_bbox": dt.GIoULoss(loss_weight=2 * factor),
        }
    if name == "yolox":
        return {
            "loss_cls": dt.CrossEntropyLoss(**bce, reduction="sum"),
            "loss_obj": dt.CrossEntropyLoss(**bce, reduction="sum"),
            "loss_bbox": dt.IoULoss(mode="square", reduction="sum", loss_weight=5 * factor),
            "loss_l1": dt.L1Loss(reduction="sum", loss_weight=factor),
        }
    if name == "yolov9":
        rates = {"cls_rate": 0.5, "dfl_rate": 1.5, "iou_rate": 7.5}
        return {rate: value * factor for rate, value in rates.items()}
    return {}


def images_of(given: Case, index: Sequence[int]) -> Case:
    """The batch of some of the images, in that order."""
    inputs, at = given.inputs, torch.tensor(list(index), dtype=torch.int64)
    if given.name == "yolox":
        masks = inputs["pos_masks"].view(inputs["flatten_objectness"].shape)
        # Of each positive its row among the targets, image by image.
        rows = torch.full(masks.shape, -1, device=masks.device)
        rows[masks] = torch.arange(int(masks.sum()), device=masks.device)
        rows = rows[at][masks[at]]
        by_positive = ("cls_targets", "bbox_targets", "l1_targets")

        def of_yolox(path: str, x: Tensor) -> Tensor:
            if x.dim() == 0:
                return x
            if path in by_positive:
                return x[rows]
            if path in ("obj_targets", "pos_masks"):
                return x.view(*masks.shape, *x.shape[1:])[at].flatten(0, 1)
            return x[at]

        return given.changed(of_yolox)
    whole = ("up", "reg_scale")
    lists = {"targets", "dn_positive_idx"} if given.name in SET_CRITERIA else set()

    def chosen(tree: Any, name: str = "") -> Any:
        if name in lists and isinstance(tree, list):
            return [tree[i] for i in index]
        if isinstance(tree, dict):
            return {key: chosen(value, key) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)([chosen(value) for value in tree])
        if isinstance(tree, Tensor) and tree.dim() and name not in whole:
            return tree.detach()[at].requires_grad_(tree.requires_grad)
        return tree

    return dataclasses.replace(given, inputs=chosen(inputs))


def property_of(examples: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """The decorated test of a criterion by name, on `examples` fixed draws of the strategies.

    With `--fuzz-minutes` the draws are random, and go on for this test's even share of the time.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(request: pytest.FixtureRequest, name: str) -> None:
            minutes = request.config.getoption("--fuzz-minutes")
            n_tests = _n_properties * len(NAMES)
            end = time.monotonic() + 60 * minutes / n_tests
            while True:
                chosen = settings(
                    max_examples=examples,
                    derandomize=not minutes,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                )
                chosen(given(name=st.just(name), **drawn)(test))()
                if time.monotonic() >= end:
                    break

        global _n_properties
        _n_properties += 1
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("name", NAMES)(run)

    return decorate
