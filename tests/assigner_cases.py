"""Batches for the assigners, and what OTX 2.3.0's own assign in them.

    OTX_ROOT=otx-2.3.0-py3-none-any.whl python tests/assigner_cases.py FILE

writes OTX's answers, of each case (B, A) the index of each anchor's target, -1 for none and -2 for
what is ignored. It is a program of its own, since it puts placeholders into sys.modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from detloss_triton import anchors

SIZE, CLASSES = 128, 5
COUNTS = ((3, 6), (0, 4), (0, 0), (40, 1))
SEEDS = (1, 2)
WIDTHS = [[39.0, 92.0, 141.0], [206.0, 386.0, 717.0]]
HEIGHTS = [[49.0, 148.0, 324.0], [587.0, 381.0, 323.0]]
# By assigner: arguments other than the defaults.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "SimOTAAssigner": [{}, {"center_radius": 1.5, "candidate_topk": 5, "cls_weight": 2.0}],
    "DynamicSoftLabelAssigner": [{}, {"soft_center_radius": 2.0, "topk": 7, "iou_weight": 1.0}],
    "ATSSAssigner": [{"topk": 9}, {"topk": 4}],
    "MaxIoUAssigner": [
        {"pos_iou_thr": 0.4, "neg_iou_thr": 0.4, "gt_max_assign_all": False},
        {"pos_iou_thr": 0.5, "neg_iou_thr": (0.05, 0.3), "min_pos_iou": 0.2},
    ],
}


@dataclass
class Case:
    """A batch: `priors` are points or anchors, and `sizes` how many a level has."""

    name: str
    arguments: dict[str, Any]
    priors: Tensor
    sizes: tuple[int, ...]
    logits: Tensor
    objectness: Tensor
    boxes: Tensor
    targets: list[dict[str, Tensor]]

    def __str__(self) -> str:
        counts = [len(target["labels"]) for target in self.targets]
        return f"{self.name} {self.arguments} {counts}"


def maps(*strides: int) -> list[tuple[int, int]]:
    return [(SIZE // stride, SIZE // stride) for stride in strides]


def priors_of(name: str) -> tuple[Tensor, tuple[int, ...]]:
    strides = (8, 16, 32)
    if name == "ATSSAssigner":
        return anchors.grid_anchors(maps(*strides, 64, 128), (*strides, 64, 128))
    if name == "MaxIoUAssigner":
        return anchors.clustered_anchors(maps(16, 32), (16, 32), WIDTHS, HEIGHTS)
    offset = 0.5 if name == "SimOTAAssigner" else 0.0
    return anchors.points(maps(*strides), strides, offset), ()


def boxes_of(n: int, generator: torch.Generator) -> Tensor:
    centre = SIZE * (0.1 + 0.8 * torch.rand(n, 2, generator=generator))
    half = 4 + 0.175 * SIZE * torch.rand(n, 2, generator=generator)
    return torch.cat([centre - half, centre + half], 1).clamp(0, SIZE)


def cases(*names: str) -> Iterator[Case]:
    """Predictions are jittered targets, so that many anchors overlap each."""
    for name in names or ARGUMENTS:
        for arguments in ARGUMENTS[name]:
            for counts in COUNTS:
                for seed in SEEDS:
                    generator = torch.Generator().manual_seed(seed)
                    yield random_case(name, arguments, counts, generator)


def random_case(
    name: str, arguments: dict[str, Any], counts: tuple[int, ...], generator: torch.Generator
) -> Case:
    priors, sizes = priors_of(name)
    n_anchors = len(priors)
    targets, boxes = [], []
    for n in counts:
        labels = torch.randint(0, CLASSES, (n,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes_of(n, generator)})
        others = torch.cat([targets[-1]["boxes"], boxes_of(max(n, 1), generator)])
        which = torch.randint(0, len(others), (n_anchors,), generator=generator)
        boxes.append(others[which] + 4 * torch.randn(n_anchors, 4, generator=generator))
    logits = 2 * torch.randn(len(counts), n_anchors, CLASSES, generator=generator)
    objectness = torch.randn(len(counts), n_anchors, generator=generator)
    return Case(name, arguments, priors, sizes, logits, objectness, torch.stack(boxes), targets)


def by_otx(case: Case) -> Tensor:
    module = "otx.algo.common.utils.assigners"
    if case.name in ("SimOTAAssigner", "ATSSAssigner"):
        module = "otx.algo.detection.utils.assigners"
    instances = import_module("otx.algo.utils.mmengine_utils").InstanceData
    assigner = getattr(import_module(module), case.name)(**case.arguments)
    scores = case.logits
    if case.name == "SimOTAAssigner":
        # As OTX's head hands them over.
        scores = (scores.sigmoid() * case.objectness.sigmoid().unsqueeze(2)).sqrt()
    found = []
    for i, target in enumerate(case.targets):
        predicted = instances(priors=case.priors, scores=scores[i], bboxes=case.boxes[i])
        truth = instances(bboxes=target["boxes"], labels=target["labels"])
        levels = {"num_level_priors": list(case.sizes)} if case.name == "ATSSAssigner" else {}
        assigned = assigner.assign(pred_instances=predicted, gt_instances=truth, **levels)
        found.append(assigned.gt_inds - 1)
    return torch.stack(found)


if __name__ == "__main__":
    import otx_heads

    otx_heads.load_from(os.environ["OTX_ROOT"])
    answers = [by_otx(case).flatten() for case in cases()]
    torch.save(torch.cat(answers).to(torch.int8), sys.argv[1])
