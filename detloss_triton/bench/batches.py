"""Random batches for the seven criteria: criterion, arguments of its forward, leaves.

Everything is drawn from one seeded generator on the CPU and then moved, so that devices agree.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import detloss_triton as dt

from .trees import leaves, mapped, shared

STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Batch:
    """One call of a criterion, of ours or of a `library` with the same names.

    `differentiable` names the arguments, or the entries within them, whose tensors require
    gradients; `of_positives` is a pattern of the dotted paths of those that only positives teach.
    """

    make: Callable[..., nn.Module]
    inputs: dict[str, Any]
    differentiable: tuple[str, ...]
    of_positives: str

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Fresh leaves on the device, in `dtype`; what is no leaf stays in its own."""

        def placed(path: str, x: Tensor) -> Tensor:
            argument, entry = path.partition(".")[0], path.rpartition(".")[2]
            if argument not in self.differentiable and entry not in self.differentiable:
                return x.to(device, copy=True)
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        return dataclasses.replace(self, inputs=mapped(shared(placed), self.inputs))

    def criterion(self, device: torch.device, **kwargs: Any) -> nn.Module:
        """The batch's criterion on the device."""
        if "device" in inspect.signature(self.make).parameters:
            kwargs["device"] = device
        return self.make(**kwargs).to(device)

    def leaves(self) -> dict[str, Tensor]:
        """Dotted path -> leaf."""
        return {path: x for path, x in leaves(self.inputs) if x.requires_grad}


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def chosen(self, share: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < share

    def labels(self, positive: Tensor, n_classes: int) -> Tensor:
        """A class where positive, `n_classes` elsewhere."""
        return torch.where(positive, self.integers(0, n_classes, *positive.shape), n_classes)

    def boxes(self, size: float, *shape: int) -> Tensor:
        """Boxes xyxy within [0, size], with sides of a tenth to half of it."""
        sides = size * (0.1 + 0.4 * self.uniform(*shape, 2))
        low = (size - sides) * self.uniform(*shape, 2)
        return torch.cat([low, low + sides], -1)


def grid(size: int, stride: int) -> Tensor:
    """(n, 2) centres of a level's cells."""
    line = torch.arange(size // stride) * stride + stride / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def coder(library: Any = dt) -> Any:
    return library.DeltaXYWHBBoxCoder(target_means=(0.0,) * 4, target_stds=(0.1, 0.1, 0.2, 0.2))


def atss(
    seed: int = 0,
    images: int = 2,
    classes: int = 5,
    positives: float = 0.1,
    size: int = 64,
    strides: tuple[int, ...] = STRIDES,
) -> Batch:
    draw = Draw(seed)
    inputs: dict[str, Any] = {
        name: []
        for name in (
            "anchors",
            "cls_score",
            "bbox_pred",
            "centerness",
            "labels",
            "label_weights",
            "bbox_targets",
            "valid_label_mask",
        )
    }
    n_positive = 0
    for stride in strides:
        side = size // stride
        n = side * side
        centres = grid(size, stride).expand(images, n, 2)
        positive = draw.chosen(positives, images, n)
        n_positive += int(positive.sum())
        inputs["anchors"].append(torch.cat([centres - 4 * stride, centres + 4 * stride], -1))
        inputs["cls_score"].append(draw.normal(images, classes, side, side) * 2 - 2)
        inputs["bbox_pred"].append(draw.normal(images, 4, side, side))
        inputs["centerness"].append(draw.normal(images, 1, side, side))
        inputs["labels"].append(draw.labels(positive, classes))
        inputs["label_weights"].append(draw.chosen(0.9, images, n).float())
        reach = stride * (1 + 4 * draw.uniform(images, n, 4))
        inputs["bbox_targets"].append(
            torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)
        )
        inputs["valid_label_mask"].append(draw.chosen(0.9, images, n, classes).float())
    inputs["avg_factor"] = float(max(n_positive, 1))

    def make(library: Any = dt, **kwargs: Any) -> Any:
        slots = {
            "bbox_coder": coder(library),
            "loss_cls": library.CrossSigmoidFocalLoss(),
            "loss_bbox": library.GIoULoss(loss_weight=2.0),
        }
        return library.ATSSCriterion(classes, **{**slots, **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred", "centerness"), "bbox_pred|centerness")


def rtmdet(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, size: int = 64
) -> Batch:
    draw = Draw(seed)
    names = ("cls_score", "bbox_pred", "labels", "label_weights", "bbox_targets", "assign_metrics")
    inputs: dict[str, Any] = {name: [] for name in names}
    for stride in STRIDES:
        side = size // stride
        n = side * side
        positive = draw.chosen(positives, images, n)
        targets = draw.boxes(size, images, n)
        inputs["cls_score"].append(draw.normal(images, classes, side, side) * 2 - 2)
        inputs["bbox_pred"].append(targets + 3 * draw.normal(images, n, 4))
        inputs["labels"].append(draw.labels(positive, classes))
        inputs["label_weights"].append(draw.chosen(0.9, images, n).float())
        inputs["bbox_targets"].append(targets * positive.unsqueeze(-1))
        inputs["assign_metrics"].append(draw.uniform(images, n) * positive)
    inputs["stride"] = [(stride, stride) for stride in STRIDES]

    def make(library: Any = dt, **kwargs: Any) -> Any:
        slots = {
            "loss_cls": library.QualityFocalLoss(),
            "loss_bbox": library.GIoULoss(loss_weight=2.0),
        }
        return library.RTMDetCriterion(classes, **{**slots, **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred"), "bbox_pred")


def ssd(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, anchors: int = 150
) -> Batch:
    draw = Draw(seed)
    positive = draw.chosen(positives, images, anchors)
    inputs = {
        "cls_score": draw.normal(images, anchors, classes + 1),
        "bbox_pred": draw.normal(images, anchors, 4),
        "anchor": draw.boxes(300.0, images, anchors),
        "labels": draw.labels(positive, classes),
        "label_weights": draw.chosen(0.9, images, anchors).float(),
        "bbox_targets": draw.normal(images, anchors, 4),
        "bbox_weights": positive.unsqueeze(-1).expand(-1, -1, 4).float(),
        "avg_factor": int(positive.sum()),
    }

    def make(library: Any = dt, **kwargs: Any) -> Any:
        return library.SSDCriterion(classes, **{"bbox_coder": coder(library), **kwargs})

    return Batch(make, inputs, ("cls_score", "bbox_pred"), "bbox_pred")


def yolox(
    seed: int = 0, images: int = 2, classes: int = 5, positives: float = 0.1, anchors: int = 150
) -> Batch:
    draw = Draw(seed)
    positive = draw.chosen(positives, images * anchors)
    n_positive = int(positive.sum())
    boxes = draw.boxes(640.0, images, anchors)
    one_hot = torch.eye(classes)[draw.integers(0, classes, n_positive)]
    inputs = {
        "flatten_objectness": draw.normal(images, anchors),
        "flatten_cls_preds": draw.normal(images, anchors, classes),
        "flatten_bbox_preds": draw.normal(images, anchors, 4),
        "flatten_bboxes": boxes,
        "obj_targets": positive.float().unsqueeze(-1),
        "cls_targets": one_hot * draw.uniform(n_positive, 1),
        "bbox_targets": boxes.flatten(0, 1)[positive] + 5 * draw.normal(n_positive, 4),
        "l1_targets": draw.normal(n_positive, 4),
        "num_total_samples": torch.tensor(float(max(n_positive, 1))),
        "num_pos": torch.tensor(n_positive),
        "pos_masks": positive,
    }

    def make(library: Any = dt, **kwargs: Any) -> Any:
        return library.YOLOXCriterion(classes, **{"use_l1": True, **kwargs})

    names = ("objectness", "cls_preds", "bbox_preds", "bboxes")
    return Batch(make, inputs, tuple(f"flatten_{name}" for name in names), "flatten_(cls|bbox)")


def yolov9(
    seed: int = 0,
    images: int = 2,
    classes: int = 5,
    positives: float = 0.5,
    size: int = 64,
    targets: int = 4,
    rules: str = "otx",
) -> Batch:
    """With `positives` 0 all targets are padding. OTX knows no other rules."""
    draw = Draw(seed)

    def head() -> list[tuple[Tensor, Tensor, Tensor]]:
        sides = [size // stride for stride in STRIDES]
        return [
            (
                draw.normal(images, classes, side, side) - 2,
                draw.normal(images, 16, 4, side, side),
                0.5 + 3 * draw.uniform(images, 4, side, side),
            )
            for side in sides
        ]

    rows = torch.cat(
        [
            draw.integers(0, classes, images, targets, 1).float(),
            draw.boxes(size, images, targets),
        ],
        -1,
    )
    padding = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])
    used = torch.arange(targets) < max(1, targets // 2) if positives else torch.zeros(targets)
    used = used.bool().expand(images, targets).clone()
    used[:1] |= positives > 0
    inputs = {
        "main_preds": head(),
        "targets": torch.where(used.unsqueeze(-1), rows, padding),
        "aux_preds": head(),
    }

    def make(library: Any = dt, device: torch.device | str = "cpu", **kwargs: Any) -> Any:
        vec2box = library.Vec2Box(None, (size, size), list(STRIDES), device)
        if rules != "otx":
            kwargs = {"rules": rules, **kwargs}
        return library.YOLOv9Criterion(classes, vec2box, **kwargs)

    return Batch(make, inputs, ("main_preds", "aux_preds"), r"preds\.\d\.[12]$")


class Decoder:
    """Random outputs of a transformer decoder, and `counts` target boxes per image.

    With `settled`, each target has a query that finds it in every layer, as late in training:
    all layers then match alike. Without, predictions are as random as at its start.
    """

    def __init__(
        self,
        counts: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        classes: int = 4,
        queries: int = 12,
        layers: int = 2,
        reg_max: int = 8,
        groups: int = 2,
        seed: int | None = None,
        settled: bool = False,
    ) -> None:
        seed = len(counts) + sum(counts) if seed is None else seed
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.counts = torch.device(device), dtype, counts
        self.classes, self.queries, self.n_layers = classes, queries, layers
        self.reg_max, self.groups, self.settled = reg_max, groups, settled
        self.targets = [
            {
                "labels": torch.randint(0, classes, (n,), generator=self.generator).to(device),
                "boxes": self.boxes(n),
            }
            for n in counts
        ]
        self.finders = [torch.randperm(queries, generator=self.generator)[:n] for n in counts]

    def boxes(self, *shape: int) -> Tensor:
        corner = 0.1 + 0.8 * torch.rand(*shape, 2, generator=self.generator)
        size = 0.05 + 0.3 * torch.rand(*shape, 2, generator=self.generator)
        return torch.cat([corner, size], -1).to(self.device)

    def leaf(self, *shape: int) -> Tensor:
        x = torch.randn(*shape, generator=self.generator) - 1
        return x.to(self.device, self.dtype).requires_grad_()

    def layer(self, queries: int | None = None, corners: bool = False) -> dict[str, Tensor]:
        n, q = len(self.counts), self.queries if queries is None else queries
        layer = {
            "pred_logits": self.leaf(n, q, self.classes),
            "pred_boxes": self.boxes(n, q).to(self.dtype).requires_grad_(),
        }
        if corners:
            layer["pred_corners"] = self.leaf(n, q, 4 * (self.reg_max + 1))
            layer["ref_points"] = self.boxes(n, q)
        if self.settled and queries is None:
            self._settle(layer)
        return layer

    @torch.no_grad()
    def _settle(self, layer: dict[str, Tensor]) -> None:
        for image, (target, found) in enumerate(zip(self.targets, self.finders, strict=True)):
            for key in ("pred_boxes", "ref_points"):
                if key in layer:
                    shift = 0.02 * torch.rand(len(found), 4, generator=self.generator)
                    layer[key][image, found] = (target["boxes"] + shift.to(self.device)).to(
                        layer[key].dtype
                    )
            layer["pred_logits"][image, found, target["labels"]] = 2.0

    def meta(self) -> tuple[dict[str, Any], int]:
        """(dn_meta, number of denoising queries)."""
        most = max(self.counts)
        positives = [
            torch.cat([torch.arange(n) + 2 * most * g for g in range(self.groups)]).to(self.device)
            for n in self.counts
        ]
        meta = {"dn_positive_idx": positives, "dn_num_group": self.groups}
        return meta, 2 * most * self.groups

    def detr(self, *extras: str) -> dict[str, Any]:
        """Outputs for `DetrCriterion` with the extra layers named: "aux", "dn"."""
        outputs: dict[str, Any] = self.layer()
        if "aux" in extras:
            outputs["aux_outputs"] = [self.layer() for _ in range(self.n_layers)]
        if "dn" in extras:
            outputs["dn_meta"], queries = self.meta()
            outputs["dn_aux_outputs"] = [self.layer(queries) for _ in range(self.n_layers)]
        return outputs

    def dfine(self, *extras: str) -> dict[str, Any]:
        """Outputs for `DFINECriterion` with the extra layers named: see `DECODER_EXTRAS`."""
        outputs: dict[str, Any] = self.layer(corners=True)
        outputs["up"] = torch.tensor([0.5], device=self.device)
        outputs["reg_scale"] = torch.tensor([4.0], device=self.device)

        def taught(layers: list[dict[str, Tensor]], teacher: dict[str, Tensor]) -> Any:
            # One tensor to all, as a decoder's last layer is.
            corners, logits = teacher["pred_corners"].detach(), teacher["pred_logits"].detach()
            for layer in layers:
                layer |= {"teacher_corners": corners, "teacher_logits": logits}
            return layers

        if "aux" in extras:
            layers = [self.layer(corners=True) for _ in range(self.n_layers)]
            outputs["aux_outputs"] = taught(layers, outputs)
        if "pre" in extras:
            outputs["pre_outputs"] = self.layer()
        if "enc" in extras:
            outputs["enc_aux_outputs"] = [self.layer()]
        if "dn" in extras:
            outputs["dn_meta"], queries = self.meta()
            layers = [self.layer(queries, corners=True) for _ in range(self.n_layers)]
            outputs["dn_outputs"] = taught(layers, layers[-1])
            if "dn_pre" in extras:
                outputs["dn_pre_outputs"] = self.layer(queries)
        return outputs


DECODER_EXTRAS = ("aux", "pre", "enc", "dn", "dn_pre")
_PREDICTIONS = ("pred_logits", "pred_boxes", "pred_corners")
_DETR_WEIGHTS = {"loss_vfl": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
_DFINE_WEIGHTS = _DETR_WEIGHTS | {"loss_fgl": 0.15, "loss_ddf": 1.5}


def detr(
    seed: int = 0,
    images: int = 2,
    classes: int = 5,
    boxes: int = 3,
    queries: int = 12,
    layers: int = 2,
    groups: int = 2,
    settled: bool = True,
    extras: Sequence[str] = ("aux", "dn"),
) -> Batch:
    """Of 1 to `boxes` boxes per image."""
    counts = Draw(seed).integers(1, boxes + 1, images).tolist()
    decoder = Decoder(
        counts,
        classes=classes,
        queries=queries,
        layers=layers,
        groups=groups,
        seed=seed,
        settled=settled,
    )

    def make(library: Any = dt, **kwargs: Any) -> Any:
        settings = {"num_classes": classes, "alpha": 0.75, **kwargs}
        return library.DetrCriterion(_DETR_WEIGHTS, **settings)

    inputs = {"outputs": decoder.detr(*extras), "targets": decoder.targets}
    return Batch(make, inputs, _PREDICTIONS, "")


def dfine(
    seed: int = 0,
    images: int = 2,
    classes: int = 5,
    boxes: int = 3,
    queries: int = 12,
    layers: int = 2,
    groups: int = 2,
    reg_max: int = 32,
    settled: bool = True,
    extras: Sequence[str] = DECODER_EXTRAS,
) -> Batch:
    """Of 1 to `boxes` boxes per image."""
    counts = Draw(seed).integers(1, boxes + 1, images).tolist()
    decoder = Decoder(
        counts,
        classes=classes,
        queries=queries,
        layers=layers,
        groups=groups,
        reg_max=reg_max,
        seed=seed,
        settled=settled,
    )

    def make(library: Any = dt, **kwargs: Any) -> Any:
        settings = {"num_classes": classes, "alpha": 0.75, "reg_max": reg_max, **kwargs}
        return library.DFINECriterion(_DFINE_WEIGHTS, **settings)

    inputs = {"outputs": decoder.dfine(*extras), "targets": decoder.targets}
    return Batch(make, inputs, _PREDICTIONS, "")


DENSE: dict[str, Callable[..., Batch]] = {
    "atss": atss,
    "rtmdet": rtmdet,
    "ssd": ssd,
    "yolox": yolox,
    "yolov9": yolov9,
}
BUILDERS: dict[str, Callable[..., Batch]] = {**DENSE, "detr": detr, "dfine": dfine}
