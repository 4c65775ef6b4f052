"""A decoder layer whose queries look at the image around their boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 4
POINTS = 4
# Keeps log(p / (1 - p)) and its gradient moderate at the edges of the image.
EDGE = 1e-3


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a SiLU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def zero_start(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, of which the last one starts as the constant 0."""
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers


def logit(boxes: Tensor) -> Tensor:
    """Inverse of the sigmoid, finite for boxes of any shape with values in [0, 1]."""
    return boxes.logit(EDGE)


class PointAttention(nn.Module):
    """Attention to a few points of each level around a box (Zhu et al., 2020,
    https://arxiv.org/abs/2010.04159).

    The query says where the points lie, in units of its box, and what each weighs: unlike attention
    to all pixels, it looks at the right place before anything has been learnt.
    """

    def __init__(self, channels: int, n_levels: int) -> None:
        super().__init__()
        self.n_levels = n_levels
        self.offsets = nn.Linear(channels, HEADS * n_levels * POINTS * 2)
        self.weights = nn.Linear(channels, HEADS * n_levels * POINTS)
        self.values = nn.Conv2d(channels, channels, 1)
        self.result = nn.Linear(channels, channels)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        # Each head starts on a ray of its own from the centre to the edge of the box.
        angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        steps = torch.arange(1, POINTS + 1) / POINTS
        start = rays[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(start.expand(-1, n_levels, -1, -1).flatten())

    def forward(self, queries: Tensor, boxes: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: queries and result (B, N, d); boxes (B, N, 4) normalised cxcywh; levels
        (B, d, h, w) each."""
        n_images, n_queries, channels = queries.shape
        by_head = (n_images * HEADS, n_queries, self.n_levels, POINTS)
        offsets = self.offsets(queries).unflatten(-1, (HEADS, self.n_levels, POINTS, 2))
        centre, half = boxes[:, :, None, None, None].chunk(2, -1)
        # grid_sample wants -1 at one edge of the image and 1 at the other.
        places = 2 * centre - 1 + offsets * half
        places = places.transpose(1, 2).reshape(*by_head, 2)
        weights = self.weights(queries).unflatten(-1, (HEADS, -1)).softmax(-1)
        weights = weights.transpose(1, 2).reshape(by_head)
        sampled = torch.stack(
            [
                F.grid_sample(
                    self.values(level).reshape(n_images * HEADS, -1, *level.shape[2:]),
                    places[:, :, i],
                    align_corners=False,
                )
                for i, level in enumerate(levels)
            ],
            -2,
        )
        seen = (sampled * weights[:, None]).sum((-2, -1))
        return self.result(seen.reshape(n_images, channels, n_queries).transpose(1, 2))


class DecoderLayer(nn.Module):
    """Attention among the queries, attention to the image, and a perceptron."""

    def __init__(self, channels: int, n_levels: int) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.image = PointAttention(channels, n_levels)
        self.perceptron = perceptron(channels, 4 * channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        boxes: Tensor,
        levels: Sequence[Tensor],
        blocked: Tensor | None,
    ) -> Tensor:
        """Shapes: content, position and result (B, N, d); boxes (B, N, 4) normalised cxcywh; levels
        (B, d, h, w) each; blocked (N, N), True where a query may not attend to another."""
        placed = content + position
        heard, _ = self.among(placed, placed, content, attn_mask=blocked, need_weights=False)
        content = self.norms[0](content + heard)
        content = self.norms[1](content + self.image(content + position, boxes, levels))
        return self.norms[2](content + self.perceptron(content))
