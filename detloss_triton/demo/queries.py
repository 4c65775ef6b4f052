"""What the detectors of the DETR family share: a few places in the image, refined by a decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detloss_triton import Denoising, denoising_queries, normalised_targets, sum_losses
from detloss_triton.boxes import cxcywh_to_xyxy

from .backbone import STRIDES, Pyramid, conv
from .decode import detections
from .samples import Detections, Sample, targets_of
from .transformer import DecoderLayer, logit, perceptron, zero_start

CHANNELS = 64
QUERIES = 60
# Denoising queries of an image that belong to a box, about.
POSITIVES = 24
LAYERS = 3
# Side of the box that each pixel of a level starts from, in strides.
ANCHOR_SIZE = 2.5
LARGEST_ANCHOR = 0.9
# Share of queries that the untrained classifier calls an object.
PRIOR = 0.01

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Where the decoder starts: the denoising queries, if any, and then the chosen ones.

    Shapes:
        content: (B, N, d). boxes: (B, N, 4) normalised cxcywh, no gradient.
        levels: (B, d, h, w) per level. chosen: logits (B, Q, C) and boxes (B, Q, 4) of the pixels
        that became queries.
    """

    content: Tensor
    boxes: Tensor
    levels: list[Tensor]
    chosen: Outputs
    denoising: Denoising | None
    blocked: Tensor | None

    def split(self, layer: Outputs) -> tuple[Outputs, Outputs]:
        """Cut a layer's output (B, N, ...) into that of the denoising and of the chosen queries."""
        n_chosen = self.chosen["pred_logits"].shape[1]
        denoising = {key: value[:, :-n_chosen] for key, value in layer.items()}
        return denoising, {key: value[:, -n_chosen:] for key, value in layer.items()}


class QueryDetector(nn.Module, ABC):
    """Picks the likeliest pixels of three levels as queries (Zhao et al., 2023,
    https://arxiv.org/abs/2304.08069), refines them and, in training, denoises spoilt true boxes.

    Called as torchvision's detectors are: in training mode with samples it returns a dictionary of
    losses, `total_loss` among them; in evaluation mode one `Detections` per image.
    """

    anchors: Tensor
    criterion: nn.Module

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pyramid = Pyramid(CHANNELS)
        self.smooth = nn.ModuleList(conv(CHANNELS, CHANNELS) for _ in STRIDES)
        self.token = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS))
        self.classify_token = classifier(num_classes)
        self.locate_token = zero_start(perceptron(CHANNELS, CHANNELS, 4))
        # The last row is for queries that know nothing of a label.
        self.labels = nn.Embedding(num_classes + 1, CHANNELS)
        self.position = perceptron(4, 2 * CHANNELS, CHANNELS)
        self.layers = nn.ModuleList(DecoderLayer(CHANNELS, len(STRIDES)) for _ in range(LAYERS))
        self.classify = nn.ModuleList(classifier(num_classes) for _ in range(LAYERS))
        self.register_buffer("anchors", anchors(image_size), persistent=False)

    @abstractmethod
    def decode(self, start: Start) -> Outputs:
        """The outputs of all layers, as the criterion wants them."""

    def forward(
        self, images: Tensor, samples: Sequence[Sample] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Shapes: images (B, 3, S, S) in [0, 1]."""
        if self.training:
            assert samples is not None
            size = images.shape[-2], images.shape[-1]
            targets = normalised_targets(targets_of(samples, images.device), size)
            denoising = denoising_queries(targets, self.num_classes, POSITIVES)
            outputs = self.decode(self._start(images, denoising))
            return by_term(self.criterion(outputs, targets))
        outputs = self.decode(self._start(images, None))
        boxes = cxcywh_to_xyxy(outputs["pred_boxes"]) * images.shape[-1]
        return detections(outputs["pred_logits"].sigmoid(), boxes, images.shape[-1])

    def refine(self, layer: int, start: Start, content: Tensor, boxes: Tensor) -> Tensor:
        """The queries' content (B, N, d) after a layer that saw the image around their boxes."""
        position = self.position(boxes)
        decoder = self.layers[layer]
        result: Tensor = decoder(content, position, boxes, start.levels, start.blocked)
        return result

    def _start(self, images: Tensor, denoising: Denoising | None) -> Start:
        levels = [
            smooth(level) for smooth, level in zip(self.smooth, self.pyramid(images), strict=True)
        ]
        tokens = self.token(torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2))
        logits = self.classify_token(tokens)
        n_chosen = min(QUERIES, logits.shape[1])
        index = logits.detach().amax(-1).topk(n_chosen).indices
        tokens = _pick(tokens, index)
        boxes = (self.locate_token(tokens) + logit(self.anchors)[index]).sigmoid()
        chosen = {"pred_logits": _pick(logits, index), "pred_boxes": boxes}
        content, boxes = tokens + self.labels.weight[-1], boxes.detach()
        blocked = None
        if denoising is not None:
            content = torch.cat([self.labels(denoising.labels), content], 1)
            boxes = torch.cat([denoising.boxes, boxes], 1)
            blocked = denoising.blocked(n_chosen)
        return Start(content, boxes, levels, chosen, denoising, blocked)


def classifier(num_classes: int) -> nn.Linear:
    """Class logits that start at the prior."""
    layer = nn.Linear(CHANNELS, num_classes)
    nn.init.constant_(layer.bias, math.log(PRIOR / (1 - PRIOR)))
    return layer


def anchors(image_size: int) -> Tensor:
    """(A, 4) normalised cxcywh: a square at the centre of each pixel, from the finest level on."""
    levels = []
    for stride in STRIDES:
        centres = (torch.arange(image_size // stride) + 0.5) * stride / image_size
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        side = torch.full_like(x, min(ANCHOR_SIZE * stride / image_size, LARGEST_ANCHOR))
        levels.append(torch.stack([x, y, side, side], -1).flatten(0, 1))
    return torch.cat(levels)


def by_term(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum each term, as "loss_vfl" of "loss_vfl_aux_0", over the layers; "total_loss" sums all."""
    terms: dict[str, list[Tensor]] = {}
    for name, loss in losses.items():
        terms.setdefault("_".join(name.split("_")[:2]), []).append(loss)
    sums = {term: sum_losses({term: values}) for term, values in terms.items()}
    return {**sums, "total_loss": sum_losses(sums)}


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows (B, Q, n) of (B, A, n) at index (B, Q)."""
    return tensor.gather(1, index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))
