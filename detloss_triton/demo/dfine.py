"""A detector that refines distributions of box sides, trained with the D-FINE criterion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detloss_triton import DFINECriterion
from detloss_triton.ops.queries import bin_positions

from .queries import CHANNELS, LAYERS, Outputs, QueryDetector, Start, classifier
from .transformer import logit, perceptron, zero_start

WEIGHTS: dict[str, int | float] = {
    "loss_vfl": 1,
    "loss_bbox": 5,
    "loss_giou": 2,
    "loss_fgl": 0.15,
    "loss_ddf": 1.5,
}
ALPHA = 0.75
BINS = 33
# How far the outermost bins reach, and how many parts of a box's size a unit of distance is.
UP, SCALE = 0.5, 4.0


class DFINEDetector(QueryDetector):
    """The first layer places a box; every layer adds to the distributions of how far each of its
    sides is off (Peng et al., 2024, https://arxiv.org/abs/2410.13842)."""

    up: Tensor
    scale: Tensor
    positions: Tensor

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        super().__init__(num_classes, image_size)
        self.place = zero_start(perceptron(CHANNELS, CHANNELS, 4))
        self.classify_placed = classifier(num_classes)
        self.corners = nn.ModuleList(
            zero_start(perceptron(CHANNELS, CHANNELS, 4 * BINS)) for _ in range(LAYERS)
        )
        self.register_buffer("up", torch.tensor([UP]), persistent=False)
        self.register_buffer("scale", torch.tensor([SCALE]), persistent=False)
        positions = bin_positions(BINS - 1, self.up, self.scale)
        self.register_buffer("positions", positions, persistent=False)
        self.criterion = DFINECriterion(WEIGHTS, ALPHA, num_classes=num_classes, reg_max=BINS - 1)
        self.to(device)

    def decode(self, start: Start) -> Outputs:
        """The layers' outputs; the last teaches the distributions of those before it."""
        content = self.refine(0, start, start.content, start.boxes)
        placed = (self.place(content) + logit(start.boxes)).sigmoid()
        first = {"pred_logits": self.classify_placed(content), "pred_boxes": placed}
        points = placed.detach()
        corners = self.corners[0](content)
        layers = [self._layer(0, content, corners, points)]
        for i in range(1, LAYERS):
            before, boxes = content.detach(), layers[-1]["pred_boxes"].detach()
            content = self.refine(i, start, content, boxes)
            corners = corners + self.corners[i](content + before)
            layers.append(self._layer(i, content, corners, points))

        denoising, matched = zip(*(start.split(layer) for layer in layers), strict=True)
        first_denoising, first_matched = start.split(first)
        outputs: Outputs = {
            **matched[-1],
            "up": self.up,
            "reg_scale": self.scale,
            "aux_outputs": _taught(matched),
            "pre_outputs": first_matched,
            "enc_aux_outputs": [start.chosen],
        }
        if start.denoising is not None:
            outputs |= {
                "dn_outputs": [*_taught(denoising), denoising[-1]],
                "dn_pre_outputs": first_denoising,
                "dn_meta": start.denoising.meta,
            }
        return outputs

    def _layer(self, i: int, content: Tensor, corners: Tensor, points: Tensor) -> Outputs:
        distances = corners.unflatten(-1, (4, BINS)).softmax(-1) @ self.positions
        return {
            "pred_logits": self.classify[i](content),
            "pred_boxes": moved_sides(points, distances, SCALE),
            "pred_corners": corners,
            "ref_points": points,
        }


def moved_sides(points: Tensor, distances: Tensor, scale: float) -> Tensor:
    """Boxes with sides `1 / 2 + distances / scale` times the reference's size from its centre.

    Shapes:
        points: (..., 4) reference boxes cxcywh. distances: (..., 4), sides l, t, r, b. Returns
        (..., 4) cxcywh.
    """
    centre, size = points.chunk(2, -1)
    left_top, right_bottom = (distances / scale).chunk(2, -1)
    return torch.cat(
        [centre + (right_bottom - left_top) / 2 * size, (1 + left_top + right_bottom) * size], -1
    )


def _taught(layers: Sequence[Outputs]) -> list[Outputs]:
    """All layers but the last, with the last as their teacher."""
    teacher = {
        "teacher_corners": layers[-1]["pred_corners"].detach(),
        "teacher_logits": layers[-1]["pred_logits"].detach(),
    }
    return [{**layer, **teacher} for layer in layers[:-1]]
