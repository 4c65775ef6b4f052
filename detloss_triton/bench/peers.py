"""Other implementations of what we compute, each behind a thin adapter.

An adapter takes a task's inputs and returns what ours returns; before a peer is timed its numbers
are compared with the same float64 reference as ours. A peer that is not installed, or computes
something else, is reported with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_triton import sum_losses

from .batches import BUILDERS
from .cases import CriterionCase, OpCase
from .providers import Absent, Provider, Run, Task, Tree, first_line

Adapter = Callable[[Any, Task], Run]


@dataclass(frozen=True)
class Peer:
    """A library, the module of it that is imported, and an adapter for each subject."""

    name: str
    module: str
    adapters: dict[str, Adapter]

    def make(self, task: Task) -> Run:
        try:
            module = importlib.import_module(self.module)
        # A library built for another torch raises anything while it is imported.
        except Exception as error:
            raise Absent(f"does not import here ({first_line(error)})") from None
        return self.adapters[subject(task.case)](module, task)


def subject(case: OpCase | CriterionCase) -> str:
    """What adapters are listed by: the name of an op or of a criterion's builder."""
    if isinstance(case, OpCase):
        return str(case.op.name)
    return "matcher" if case.matcher else case.builder


def peers_of(case: OpCase | CriterionCase) -> list[Provider]:
    return [Provider(peer.name, peer.make) for peer in PEERS if subject(case) in peer.adapters]


def _one_hot(logits: Tensor, label: Tensor, score: Tensor | None) -> Tensor:
    """Dense targets, which these libraries want; making them is part of their step."""
    n_classes = logits.shape[-1]
    dense = F.one_hot(label, n_classes + 1)[:, :n_classes].to(logits.dtype)
    return dense if score is None else dense * score.unsqueeze(-1)


def _binary_cross_entropy(functional: Any, task: Task) -> Run:
    def run(tree: Tree) -> Tensor:
        logits, label, score, _ = tree["inputs"]
        loss: Tensor = functional.binary_cross_entropy_with_logits(
            logits, _one_hot(logits, label, score), reduction="sum"
        )
        return loss

    return run


def _cross_entropy(functional: Any, task: Task) -> Run:
    def run(tree: Tree) -> Tensor:
        logits, left, weight_left, weight_right = tree["inputs"]
        loss: Tensor
        if weight_left is None:
            loss = functional.cross_entropy(logits, left, reduction="sum")
            return loss
        at_left = functional.cross_entropy(logits, left, reduction="none")
        at_right = functional.cross_entropy(logits, left + 1, reduction="none")
        loss = (at_left * weight_left + at_right * weight_right).sum()
        return loss

    return run


def _coordinates(name: str) -> Adapter:
    def adapter(functional: Any, task: Task) -> Run:
        params, function = task.params, getattr(functional, name)
        return lambda tree: function(*tree["inputs"], reduction="sum", **params)

    return adapter


def _focal(ops: Any, task: Task) -> Run:
    params = task.params

    def run(tree: Tree) -> Tensor:
        logits, label, score, _ = tree["inputs"]
        targets = _one_hot(logits, label, score)
        loss: Tensor = ops.sigmoid_focal_loss(logits, targets, **params, reduction="sum")
        return loss

    return run


def _boxes(name: str) -> Adapter:
    def adapter(ops: Any, task: Task) -> Run:
        eps, function = task.params["eps"], getattr(ops, name)
        return lambda tree: function(*tree["inputs"], reduction="sum", eps=eps)

    return adapter


def _scipy_assignment(optimize: Any, task: Task) -> Run:
    def run(tree: Tree) -> Tensor:
        cost = tree["inputs"][0]
        column_of_row = torch.full(cost.shape[:2], -1)
        for out, problem in zip(column_of_row, cost.cpu().numpy(), strict=True):
            rows, columns = optimize.linear_sum_assignment(problem)
            out[torch.from_numpy(rows)] = torch.from_numpy(columns)
        return column_of_row.to(cost.device)

    return run


def _batch_assignment(module: Any, task: Task) -> Run:
    def run(tree: Tree) -> Tensor:
        matching: Tensor = module.batch_linear_assignment(tree["inputs"][0])
        return matching

    return run


def _config(**settings: Any) -> Any:
    """What the losses of transformers read of a model's configuration."""
    return SimpleNamespace(
        num_labels=80,
        matcher_class_cost=2.0,
        matcher_bbox_cost=5.0,
        matcher_giou_cost=2.0,
        use_focal_loss=True,
        matcher_alpha=0.25,
        matcher_gamma=2.0,
        weight_loss_vfl=1.0,
        weight_loss_bbox=5.0,
        weight_loss_giou=2.0,
        eos_coefficient=1e-4,
        focal_loss_alpha=0.75,
        focal_loss_gamma=2.0,
        **settings,
    )


def _transformers_layer(output: Tree) -> Tree:
    keys = ("pred_boxes", "pred_corners", "ref_points", "teacher_corners", "teacher_logits")
    return {"logits": output["pred_logits"]} | {key: output[key] for key in keys if key in output}


def _transformers_targets(tree: Tree) -> list[dict[str, Tensor]]:
    return [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in tree["targets"]]


def _classes_of(tree: Tree) -> int:
    return int(tree["outputs"]["pred_logits"].shape[-1])


def _matcher(module: Any, task: Task) -> Run:
    matcher = module.RTDetrHungarianMatcher(_config())

    def run(tree: Tree) -> list[Tensor]:
        outputs = _transformers_layer(tree["outputs"])
        pairs = matcher(outputs, _transformers_targets(tree))
        return [x for pair in pairs for x in pair]

    return run


def _rt_detr(module: Any, task: Task) -> Run:
    config = _config()
    config.num_labels = _classes_of(task.inputs)
    criterion = module.RTDetrLoss(config).to(task.device)

    def run(tree: Tree) -> Tensor:
        ours = tree["outputs"]
        outputs = _transformers_layer(ours)
        outputs["auxiliary_outputs"] = [_transformers_layer(o) for o in ours["aux_outputs"]]
        if "dn_aux_outputs" in ours:
            outputs["dn_auxiliary_outputs"] = [
                _transformers_layer(o) for o in ours["dn_aux_outputs"]
            ]
            outputs["denoising_meta_values"] = ours["dn_meta"]
        losses = criterion(outputs, _transformers_targets(tree))
        return torch.stack(list(losses.values())).sum()

    return run


def _d_fine(module: Any, task: Task) -> Run:
    ours = task.inputs["outputs"]
    if "dn_outputs" in ours or "pre_outputs" in ours:
        raise Absent("computes other losses for denoising layers, and none before the decoder")
    config = _config(
        max_num_bins=ours["pred_corners"].shape[-1] // 4 - 1,
        reg_scale=float(ours["reg_scale"]),
        up=float(ours["up"]),
        weight_loss_fgl=0.15,
        weight_loss_ddf=1.5,
    )
    config.num_labels = _classes_of(task.inputs)
    criterion = module.DFineLoss(config).to(task.device)

    def run(tree: Tree) -> Tensor:
        ours = tree["outputs"]
        outputs = _transformers_layer(ours)
        # The last layer teaches and is taught nothing, which to this peer is its own teacher.
        outputs["teacher_corners"] = ours["pred_corners"]
        outputs["teacher_logits"] = ours["pred_logits"]
        layers = (*ours["aux_outputs"], *ours["enc_aux_outputs"])
        outputs["auxiliary_outputs"] = [_transformers_layer(o) for o in layers]
        losses = criterion(outputs, _transformers_targets(tree))
        return torch.stack(list(losses.values())).sum()

    return run


# Where OTX keeps the classes that a batch's criterion is made of.
OTX = (
    "otx.algo.detection.losses",
    "otx.algo.common.losses",
    "otx.algo.common.utils.coders",
    "otx.algo.detection.utils.utils",
)


def _otx(_: Any, task: Task) -> Run:
    classes: dict[str, Any] = {}
    for module in OTX:
        classes |= vars(importlib.import_module(module))
    assert task.batch is not None
    outputs = task.inputs.get("outputs", {})
    if "pred_corners" in outputs and "pre_outputs" not in outputs:
        raise Absent("computes no D-FINE without the layer before the decoder")
    criterion = task.batch.criterion(task.device, library=SimpleNamespace(**classes))
    return lambda tree: sum_losses(criterion(**tree))


PEERS = (
    Peer("OTX", OTX[0], dict.fromkeys(BUILDERS, _otx)),
    Peer(
        "torch.nn.functional",
        "torch.nn.functional",
        {
            "binary_cross_entropy": _binary_cross_entropy,
            "two_bin": _cross_entropy,
            "l1": _coordinates("l1_loss"),
            "smooth_l1": _coordinates("smooth_l1_loss"),
        },
    ),
    Peer(
        "torchvision",
        "torchvision.ops",
        {
            "sigmoid_focal": _focal,
            "giou_loss": _boxes("generalized_box_iou_loss"),
            "diou_loss": _boxes("distance_box_iou_loss"),
            "ciou_loss": _boxes("complete_box_iou_loss"),
        },
    ),
    Peer("scipy", "scipy.optimize", {"optimal_assignment": _scipy_assignment}),
    Peer(
        "torch-linear-assignment",
        "torch_linear_assignment",
        {"optimal_assignment": _batch_assignment},
    ),
    Peer(
        "transformers",
        "transformers.loss.loss_rt_detr",
        {"detr": _rt_detr, "matcher": _matcher},
    ),
    Peer("transformers", "transformers.loss.loss_d_fine", {"dfine": _d_fine}),
)
