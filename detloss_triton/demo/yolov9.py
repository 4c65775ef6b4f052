"""An anchor-free detector trained with the YOLOv9 criterion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detloss_triton import Vec2Box, YOLOv9Criterion, pad_targets

from .backbone import STRIDES, UNLIKELY, Pyramid, branch
from .decode import detections
from .samples import Detections, Sample, targets_of

BINS = 16
CHANNELS = 64


class YOLOv9Detector(nn.Module):
    """Class logits and box distributions at every pixel of three levels.

    Called as torchvision's detectors are: in training mode with samples it returns a dictionary of
    losses, `total_loss` among them; in evaluation mode one `Detections` per image.
    """

    def __init__(self, num_classes: int, image_size: int, device: torch.device) -> None:
        super().__init__()
        self.pyramid = Pyramid(CHANNELS)
        self.classify = nn.ModuleList(branch(CHANNELS, num_classes, UNLIKELY) for _ in STRIDES)
        self.locate = nn.ModuleList(branch(CHANNELS, 4 * BINS) for _ in STRIDES)
        self.vec2box = Vec2Box(None, (image_size, image_size), list(STRIDES), device)
        self.criterion = YOLOv9Criterion(num_classes, self.vec2box)
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32), persistent=False)
        self.to(device)

    def forward(
        self, images: Tensor, samples: Sequence[Sample] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Shapes: images (B, 3, S, S) in [0, 1]."""
        predictions = [
            self._predict(classify(features), locate(features))
            for features, classify, locate in zip(
                self.pyramid(images), self.classify, self.locate, strict=True
            )
        ]
        if self.training:
            assert samples is not None
            losses = self.criterion(predictions, pad_targets(targets_of(samples, images.device)))
            assert losses is not None  # padded, there is a row
            return losses
        logits, _, boxes = self.vec2box(predictions)
        return detections(logits.sigmoid(), boxes, images.shape[-1])

    def _predict(self, logits: Tensor, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of classes (B, C, h, w) and bins (B, 16, 4, h, w), distances (B, 4, h, w)."""
        distribution = corners.unflatten(1, (BINS, 4))
        distances = torch.einsum("bnshw,n->bshw", distribution.softmax(1), self.bins)
        return logits, distribution, distances
