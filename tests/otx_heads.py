"""OTX 2.3.0's own heads and target assigners in front of its criteria and of ours.

    OTX_ROOT=otx-2.3.0-py3-none-any.whl python tests/otx_heads.py

Run by test_otx_heads.py, as a program of its own, since it puts placeholders into sys.modules. It
prints a line per batch: criterion, boxes per image, what of ours stood in OTX's place, and the
largest error of its losses and of the gradients of the head's parameters.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trees import leaves

import detloss_triton as dt

# Packages whose `__init__` imports much that is not needed here, nor installed: it does not run.
BARE = """
    otx otx.algo otx.algo.common otx.algo.common.utils otx.algo.detection otx.algo.detection.heads
    otx.algo.detection.losses otx.algo.detection.utils otx.algo.instance_segmentation otx.algo.utils
    otx.core otx.core.data otx.core.data.entity otx.utils
"""
# What is imported for annotations, or for models other than these.
ABSENT = """
    otx.core.config otx.core.config.data otx.core.data.entity.base otx.core.data.entity.detection
    otx.core.types otx.core.utils otx.utils.device
"""
IF_NOT_INSTALLED = """
    einops timm timm.models timm.models.layers torchvision torchvision.ops torchvision.ops.boxes
    torchvision.transforms torchvision.tv_tensors
"""


class Placeholder(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", type(name, (), {}))


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    assert (in_fmt, out_fmt) == ("xyxy", "cxcywh")
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def load_from(root: str) -> SimpleNamespace:
    """OTX's criteria and what fills their slots, under their names."""
    sys.path.insert(0, root)
    for name in BARE.split():
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package
    absent = [n for n in IF_NOT_INSTALLED.split() if find_spec(n.partition(".")[0]) is None]
    for name in ABSENT.split() + absent:
        sys.modules[name] = Placeholder(name)
    if "torchvision.ops" in absent:
        sys.modules["torchvision.ops"].box_convert = box_convert
    otx = SimpleNamespace(**vars(import_module("otx.algo.common.losses")))
    for name in ("atss", "rtmdet", "ssd", "yolox"):
        vars(otx).update(vars(import_module(f"otx.algo.detection.losses.{name}_loss")))
    coders = import_module("otx.algo.common.utils.coders")
    otx.DeltaXYWHBBoxCoder = coders.DeltaXYWHBBoxCoder
    otx.DistancePointBBoxCoder = coders.DistancePointBBoxCoder
    return otx


CLASSES, CHANNELS, SIZE = 5, 32, 128
STDS = (0.1, 0.1, 0.2, 0.2)
TRAINING = {"allowed_border": -1, "pos_weight": -1, "debug": False}


@dataclass
class Detector:
    """A head on feature maps of `strides`, and the criterion that goes with it, of a library."""

    head: nn.Module
    strides: tuple[int, ...]
    criterion: Callable[[Any], nn.Module]


def coder(library: Any) -> Any:
    return library.DeltaXYWHBBoxCoder(target_means=(0.0,) * 4, target_stds=STDS)


def assigning(assigner: Any) -> dict[str, Any]:
    sampler = import_module("otx.algo.common.utils.samplers").PseudoSampler()
    return {"assigner": assigner, "sampler": sampler, **TRAINING}


def atss(otx: Any) -> Detector:
    strides = (8, 16, 32, 64, 128)
    priors = import_module("otx.algo.common.utils.prior_generators")
    assigner = import_module("otx.algo.detection.utils.assigners").ATSSAssigner(topk=9)
    head = import_module("otx.algo.detection.heads.atss_head").ATSSHeadModule(
        CLASSES,
        CHANNELS,
        anchor_generator=priors.AnchorGenerator(
            ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=list(strides)
        ),
        bbox_coder=coder(otx),
        feat_channels=CHANNELS,
        train_cfg=assigning(assigner),
        test_cfg={},
    )

    def criterion(library: Any) -> nn.Module:
        return library.ATSSCriterion(
            CLASSES,
            coder(library),
            loss_cls=library.CrossSigmoidFocalLoss(),
            loss_bbox=library.GIoULoss(loss_weight=2.0),
            loss_centerness=library.CrossEntropyLoss(use_sigmoid=True),
        )

    return Detector(head, strides, criterion)


def rtmdet(otx: Any) -> Detector:
    strides = (8, 16, 32)
    priors = import_module("otx.algo.common.utils.prior_generators")
    assigners = import_module("otx.algo.common.utils.assigners")
    head = import_module("otx.algo.detection.heads.rtmdet_head").RTMDetSepBNHeadModule(
        CLASSES,
        CHANNELS,
        anchor_generator=priors.MlvlPointGenerator(offset=0, strides=list(strides)),
        bbox_coder=otx.DistancePointBBoxCoder(),
        feat_channels=CHANNELS,
        stacked_convs=1,
        with_objectness=False,
        exp_on_reg=True,
        train_cfg=assigning(assigners.DynamicSoftLabelAssigner(topk=13)),
        test_cfg={},
    )

    def criterion(library: Any) -> nn.Module:
        quality, giou = library.QualityFocalLoss(), library.GIoULoss(loss_weight=2.0)
        return library.RTMDetCriterion(CLASSES, loss_cls=quality, loss_bbox=giou)

    return Detector(head, strides, criterion)


def ssd(otx: Any) -> Detector:
    priors = import_module("otx.algo.detection.utils.prior_generators")
    assigners = import_module("otx.algo.common.utils.assigners")
    anchors = priors.SSDAnchorGeneratorClustered(
        strides=[16, 32],
        widths=[[39.0, 92.0, 141.0], [206.0, 386.0, 717.0]],
        heights=[[49.0, 148.0, 324.0], [587.0, 381.0, 323.0]],
    )
    assigner = assigners.MaxIoUAssigner(
        min_pos_iou=0.0, pos_iou_thr=0.4, neg_iou_thr=0.4, gt_max_assign_all=False
    )
    head = import_module("otx.algo.detection.heads.ssd_head").SSDHeadModule(
        anchors,
        coder(otx),
        {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"},
        {**TRAINING, "assigner": assigner, "use_giou": False, "use_focal": False},
        num_classes=CLASSES,
        in_channels=(CHANNELS, CHANNELS),
    )
    return Detector(head, (16, 32), lambda library: library.SSDCriterion(CLASSES, coder(library)))


def yolox(otx: Any) -> Detector:
    assigner = import_module("otx.algo.detection.utils.assigners").SimOTAAssigner(center_radius=2.5)
    head = import_module("otx.algo.detection.heads.yolox_head").YOLOXHeadModule(
        CLASSES, CHANNELS, feat_channels=CHANNELS, train_cfg={"assigner": assigner}, test_cfg={}
    )
    head.use_l1 = True

    def criterion(library: Any) -> nn.Module:
        return library.YOLOXCriterion(
            CLASSES,
            loss_cls=library.CrossEntropyLoss(use_sigmoid=True, reduction="sum"),
            loss_bbox=library.IoULoss(mode="square", eps=1e-16, reduction="sum", loss_weight=5.0),
            loss_obj=library.CrossEntropyLoss(use_sigmoid=True, reduction="sum"),
            loss_l1=library.L1Loss(reduction="sum"),
            use_l1=True,
        )

    return Detector(head, (8, 16, 32), criterion)


def boxes_of(n: int) -> tuple[Tensor, Tensor]:
    """n random boxes xyxy in pixels, and their labels."""
    centre = SIZE * (0.1 + 0.8 * torch.rand(n, 2))
    half = 4 + 0.175 * SIZE * torch.rand(n, 2)
    return torch.cat([centre - half, centre + half], 1).clamp(0, SIZE), torch.randint(5, (n,))


# Losses of a head's features and the images' truth.
LossesOf = Callable[[Detector, tuple[Tensor, ...], Any], dict[str, Any]]


def step(
    build: Callable[[Any], Detector],
    otx: Any,
    losses_of: LossesOf,
    counts: Sequence[int],
    ignored: Sequence[int],
    seed: int = 1,
) -> dict[str, Tensor]:
    """Losses behind OTX's head, and the gradients of the head.

    Args:
        counts: boxes of each image.
        ignored: labels that the images' annotators did not look for.
    """
    torch.manual_seed(seed)
    detector = build(otx)
    head = detector.head
    if hasattr(head, "init_weights"):
        head.init_weights()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    features = tuple(
        torch.randn(len(counts), CHANNELS, SIZE // stride, SIZE // stride)
        for stride in detector.strides
    )
    boxes, labels = zip(*map(boxes_of, counts), strict=True)
    size = (SIZE, SIZE)
    info = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
    ignored = list(ignored)
    infos = [SimpleNamespace(img_idx=i, ignored_labels=ignored, **info) for i in range(len(counts))]
    entity = SimpleNamespace(
        images=torch.zeros(len(counts), 3, *size),
        bboxes=list(boxes),
        labels=list(labels),
        imgs_info=infos,
        batch_size=len(counts),
    )
    losses = losses_of(detector, features, entity)
    dt.sum_losses(losses).backward()
    gradient = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in head.parameters()
    ]
    found = {key: torch.cat([x.flatten() for _, x in leaves({key: losses[key]})]) for key in losses}
    return {**found, "gradient": torch.cat(gradient)}


def by_criterion(library: Any) -> LossesOf:
    """What the library's criterion makes of what OTX's head has assigned."""

    def losses_of(detector: Detector, features: tuple[Tensor, ...], entity: Any) -> dict[str, Any]:
        losses: dict[str, Any] = detector.criterion(library)(
            **detector.head.prepare_loss_inputs(features, entity)
        )
        return losses

    return losses_of


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    errors = [
        (ours[key] - x).abs().max() / x.abs().max().clamp(min=1e-9) for key, x in theirs.items()
    ]
    return max(x.item() for x in errors)


def main() -> None:
    torch.set_num_threads(1)
    otx = load_from(os.environ["OTX_ROOT"])
    criteria = {name: value for name, value in vars(dt).items() if name.endswith("Criterion")}
    libraries = {"everything": dt, "the criterion": SimpleNamespace(**{**vars(otx), **criteria})}
    for build in (atss, rtmdet, ssd, yolox):
        for counts in ([3, 6], [0, 4], [0, 0], [40, 1]):
            for ignored in ([], [1, 3]) if build is atss else ([],):
                theirs = step(build, otx, by_criterion(otx), counts, ignored)
                for swapped, library in libraries.items():
                    with dt.validation(True):
                        ours = step(build, otx, by_criterion(library), counts, ignored)
                    batch = f"{build.__name__} {counts} ignored {ignored}, {swapped} ours"
                    print(f"{batch}: {error(ours, theirs):.1e}", flush=True)


if __name__ == "__main__":
    main()
