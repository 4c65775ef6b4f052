"""What the examples train on: images of coloured squares, with torchvision's targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES, SIZE = 3, 64

Target = dict[str, Tensor]


class Squares(Dataset[tuple[Tensor, Target]]):
    """Grey noise (3, 64, 64) with one to three squares: red, green or blue is their class.

    A target is {"boxes": (n, 4) xyxy in pixels, "labels": (n,) from 0 on}.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if index >= self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        image = 0.2 * torch.rand(3, SIZE, SIZE, generator=generator)
        n = int(torch.randint(1, 4, (), generator=generator))
        labels = torch.randint(CLASSES, (n,), generator=generator)
        corners = torch.randint(40, (n, 2), generator=generator)
        sides = torch.randint(12, 24, (n, 1), generator=generator)
        boxes = torch.cat([corners, corners + sides], 1)
        for label, (x1, y1, x2, y2) in zip(labels.tolist(), boxes.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = 0
            image[label, y1:y2, x1:x2] = 1
        return image, {"boxes": boxes.float(), "labels": labels}


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Images (B, 3, 64, 64) and their targets: images have boxes of different numbers."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]
