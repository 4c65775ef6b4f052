"""A detector with a transformer decoder, trained with the DETR criterion."""

from __future__ import annotations

import torch
from torch import nn

from detloss_triton import DetrCriterion

from .queries import CHANNELS, LAYERS, Outputs, QueryDetector, Start
from .transformer import logit, perceptron, zero_start

WEIGHTS: dict[str, int | float] = {"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2}
ALPHA = 0.75


class DetrDetector(QueryDetector):
    """Moves each query's box a little in every layer, as RT-DETR does."""

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        super().__init__(num_classes, image_size)
        self.locate = nn.ModuleList(
            zero_start(perceptron(CHANNELS, CHANNELS, 4)) for _ in range(LAYERS)
        )
        self.criterion = DetrCriterion(WEIGHTS, ALPHA, num_classes=num_classes)
        self.to(device)

    def decode(self, start: Start) -> Outputs:
        """The layers' outputs; those of the chosen pixels count as one more."""
        content, boxes = start.content, start.boxes
        layers = []
        for i, (classify, locate) in enumerate(zip(self.classify, self.locate, strict=True)):
            content = self.refine(i, start, content, boxes)
            moved = (locate(content) + logit(boxes)).sigmoid()
            layers.append({"pred_logits": classify(content), "pred_boxes": moved})
            boxes = moved.detach()
        denoising, matched = zip(*map(start.split, layers), strict=True)
        outputs: Outputs = {**matched[-1], "aux_outputs": [*matched[:-1], start.chosen]}
        if start.denoising is not None:
            outputs |= {"dn_aux_outputs": [*denoising], "dn_meta": start.denoising.meta}
        return outputs
