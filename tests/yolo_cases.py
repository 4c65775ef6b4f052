"""Batches for YOLOv9's rules "yolo", and what that project computes of them.

    YOLO_ROOT=YOLO python tests/yolo_cases.py [FILE]

YOLO_ROOT is a copy of https://github.com/MultimediaTechLab/YOLO, whose loss is run as it is. With
FILE its losses and gradients of `cases` are written there; without, a line is printed for each of
many random batches: its number, how much that project's loss depends on rounding, and the largest
error of ours. It is a program of its own, since it puts placeholders into sys.modules.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trees import mapped

import detloss_triton as dt

PARTS = ("classes", "distributions", "distances")
LOSSES = ("loss_cls", "loss_df", "loss_iou")
# What rounds in float32, relative to a coordinate or a logit.
ROUNDING = 2e-6
N_RANDOM = 60


@dataclass
class Case:
    """A batch of images of `size` squared; `head` are maps as the criterion takes them."""

    name: str
    size: int
    strides: tuple[int, ...]
    classes: int
    bins: int
    main: list[tuple[Tensor, Tensor, Tensor]]
    targets: Tensor
    aux: list[tuple[Tensor, Tensor, Tensor]]

    def criterion(self, device: str | torch.device = "cpu", rules: Any = "yolo") -> Any:
        vec2box = dt.Vec2Box(None, (self.size, self.size), self.strides, device)
        return dt.YOLOv9Criterion(self.classes, vec2box, reg_max=self.bins, rules=rules)


def drawn(
    name: str, targets: Tensor, seed: int, size: int, bins: int, strides: tuple[int, ...] = (8, 16)
) -> Case:
    """Random predictions, whose boxes reach as far as targets do."""
    generator = torch.Generator().manual_seed(seed)
    n_images, classes = len(targets), 2

    def head() -> list[tuple[Tensor, Tensor, Tensor]]:
        levels = []
        for stride in strides:
            n = size // stride
            levels.append(
                (
                    torch.randn(n_images, classes, n, n, generator=generator) - 1,
                    torch.randn(n_images, bins, 4, n, n, generator=generator),
                    0.3 + bins / 2 * torch.rand(n_images, 4, n, n, generator=generator).square(),
                )
            )
        return levels

    return Case(name, size, strides, classes, bins, head(), targets, head())


def rows(*images: list[list[float]]) -> Tensor:
    """(B, T, 5), padded."""
    most = max(map(len, images))
    padding = [-1.0, 0.0, 0.0, 0.0, 0.0]
    padded = [image + [padding] * (most - len(image)) for image in images]
    return torch.tensor(padded, dtype=torch.float32)


def cases() -> Iterator[Case]:
    """Few and small; each rule decides something in one of them."""
    rules = rows(
        [
            [0, 4, 4, 28, 20],  # on anchors
            [1, 6, 5, 27, 22],  # beside another that wants the same anchors
            [0, 29, 29, 34, 34],  # between anchors
            [1, 0, 0, 47, 47],  # beyond the reach of most
            [0, 90, 90, 95, 95],  # which nobody wants
        ],
        [[1, 13, 13, 19, 18]],
    )
    yield drawn("each rule", rules, 0, 48, 5)
    generator = torch.Generator().manual_seed(26)
    crowd = torch.cat([random_rows(1, 12, 32, generator), torch.full((1, 12, 5), -1.0)])
    yield drawn("a crowd, and an image without targets", crowd, 26, 32, 6)
    yield drawn("scores of less than 1", rows([[0, 9, 9, 15, 16]]), 2, 32, 5)
    yield drawn("nothing but padding", rows([[-1, 0, 0, 0, 0]], [[-1, 0, 0, 0, 0]]), 3, 32, 5)
    yield drawn("no rows", torch.zeros(1, 0, 5), 4, 32, 5)


def random_rows(n_images: int, n: int, size: int, generator: torch.Generator) -> Tensor:
    """Most boxes are small, some as large as the image; coordinates are whole as anchors' are."""
    centre = size * torch.rand(n_images, n, 2, generator=generator)
    half = 1 + 0.6 * size * torch.rand(n_images, n, 2, generator=generator) ** 3
    label = torch.randint(0, 2, (n_images, n, 1), generator=generator)
    return torch.cat([label, (centre - half).round(), (centre + half).round()], -1)


def random_cases() -> Iterator[Case]:
    for i in range(N_RANDOM):
        generator = torch.Generator().manual_seed(i)
        targets = random_rows(1 + i % 3, 1 + i % 7 * 5, 64, generator)
        if i % 4 == 0:
            targets[-1] = -1
        strides = (8, 16, 32) if i % 2 else (16, 8)
        yield drawn(str(i), targets, i, 64, 5 + i % 12, strides)


def as_leaves(head: Any) -> Any:
    return mapped(lambda _, x: x.clone().requires_grad_(), head)


def results(
    losses: dict[str, Tensor], heads: tuple[Any, Any]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and gradients of their sum: of each part, those of all levels and heads in a row."""
    sum(losses.values()).backward()  # type: ignore[union-attr]
    by_part = zip(*(level for head in heads for level in head), strict=True)
    gradients = [[torch.zeros_like(x) if x.grad is None else x.grad for x in p] for p in by_part]
    joined = [torch.cat([x.flatten() for x in part]).cpu() for part in gradients]
    return {k: x.item() for k, x in losses.items()}, dict(zip(PARTS, joined, strict=True))


def by_ours(
    case: Case, device: str | torch.device = "cpu"
) -> tuple[dict[str, float], dict[str, Tensor]]:
    heads = [as_leaves(mapped(lambda _, x: x.to(device), head)) for head in (case.main, case.aux)]
    losses = case.criterion(device)(heads[0], case.targets.to(device), heads[1])
    total = losses.pop("total_loss")
    torch.testing.assert_close(total, sum(losses.values()))
    return results(losses, tuple(heads))


def by_yolo(case: Case) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Its losses have other names, and come as numbers: the whole is what is differentiated."""
    boxes = import_module("yolo.utils.bounding_box_utils")
    size = [case.size, case.size]
    vec2box = boxes.Vec2Box(None, SimpleNamespace(strides=list(case.strides)), size, "cpu")
    matcher = {"iou": "CIoU", "topk": 10, "factor": {"iou": 6.0, "cls": 0.5}}
    rates = {"BCELoss": 0.5, "DFLoss": 1.5, "BoxLoss": 7.5}
    loss = SimpleNamespace(matcher=matcher, objective=rates, aux=0.25)
    config = SimpleNamespace(
        task=SimpleNamespace(loss=loss),
        dataset=SimpleNamespace(class_num=case.classes),
        model=SimpleNamespace(anchor=SimpleNamespace(reg_max=case.bins)),
    )
    whole = import_module("yolo.tools.loss_functions").DualLoss(config, vec2box)
    heads = as_leaves(case.main), as_leaves(case.aux)
    total, by_name = whole(vec2box(heads[1]), vec2box(heads[0]), case.targets)
    _, gradients = results({"total": total}, heads)
    names = ("Loss/BCELoss", "Loss/DFLLoss", "Loss/BoxLoss")
    return {k: by_name[name] for k, name in zip(LOSSES, names, strict=True)}, gradients


def error(ours: Any, theirs: Any) -> float:
    """The largest, relative to a loss or to the largest gradient of a part."""
    worst = 0.0
    for expected, found in zip(theirs, ours, strict=True):
        for key, x in expected.items():
            x, y = torch.as_tensor(x), torch.as_tensor(found[key])
            assert x.shape == y.shape, key
            worst = max(worst, ((x - y).abs().max() / x.abs().max().clamp(min=1e-6)).item())
    return worst


def rounded(case: Case) -> Case:
    generator = torch.Generator().manual_seed(0)

    def off(_: str, x: Tensor) -> Tensor:
        return x * (1 + ROUNDING * torch.randn(x.shape, generator=generator))

    heads = mapped(off, {"main": case.main, "aux": case.aux})
    return Case(**{**vars(case), **heads})


def load_from(root: str) -> None:
    """Have that project's loss imported from there, and nothing of what it only mentions."""

    class Nothing:
        pass

    def module(name: str, **attributes: Any) -> None:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(attributes)

    for package in ("yolo", "yolo.utils", "yolo.tools", "yolo.config", "yolo.model"):
        module(package, __path__=[str(Path(root).joinpath(*package.split(".")))])
    configs = ("Config", "LossConfig", "AnchorConfig", "MatcherConfig", "NMSConfig")
    module("yolo.config.config", **dict.fromkeys(configs, Nothing))
    module("yolo.model.yolo", YOLO=Nothing)
    module("yolo.utils.logger", logger=logging.getLogger("yolo"))
    for name in ("torchmetrics", "torchvision"):
        module(name)
    module("torchmetrics.detection", MeanAveragePrecision=Nothing)
    module("torchvision.ops", batched_nms=None)
    # Of a map's layout alone, which is written out here.
    module("einops", rearrange=_rearranged)


def _rearranged(x: Tensor, pattern: str) -> Tensor:
    """A map's cells as one dimension, the second."""
    x = x.flatten(-2)
    return x.permute(0, *range(x.dim() - 1, 0, -1))


if __name__ == "__main__":
    load_from(os.environ["YOLO_ROOT"])
    if len(sys.argv) > 1:
        answers = [by_yolo(case) for case in cases()]
        # Nearly all gradients of boxes and distributions are 0.
        kept = [
            (losses, {k: (g.nonzero()[:, 0].short(), g[g != 0], len(g)) for k, g in grads.items()})
            for losses, grads in answers
        ]
        torch.save(kept, sys.argv[1])
    else:
        for each in random_cases():
            theirs = by_yolo(each)
            unclear = error(by_yolo(rounded(each)), theirs)
            print(each.name, f"{unclear:.1e}", f"{error(by_ours(each), theirs):.1e}", flush=True)
