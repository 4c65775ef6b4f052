"""A small convolutional pyramid: features at strides 8, 16 and 32."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)
# Logit of the share of anchors that an untrained classifier calls an object: near the truth, so
# that the first steps are not spent on unlearning thousands of false alarms.
UNLIKELY = math.log(0.01 / 0.99)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(inplace=True),
    )


def branch(channels: int, outputs: int, bias: float = 0.0) -> nn.Sequential:
    """The layers of a head that predict `outputs` maps, which start around a bias."""
    last = nn.Conv2d(channels, outputs, 1)
    assert last.bias is not None
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(conv(channels, channels), last)


class Residual(nn.Module):
    """A convolution of half as many channels added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels // 2, 1), conv(channels // 2, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: features and result (B, C, h, w)."""
        result: Tensor = features + self.body(features)
        return result


class Pyramid(nn.Module):
    """Features of `channels` channels at each of `STRIDES`; coarse levels inform the finer ones.

    Shapes: images (B, 3, S, S) in [0, 1], S a multiple of 32; one (B, channels, S/s, S/s) per
    stride s is returned.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, stride=2), conv(16, 32, stride=2))
        self.fine = nn.Sequential(conv(32, 64, stride=2), Residual(64))
        self.middle = nn.Sequential(conv(64, 96, stride=2), Residual(96))
        self.coarse = nn.Sequential(conv(96, 128, stride=2), Residual(128))
        self.lateral = nn.ModuleList(conv(width, channels, 1) for width in (64, 96, 128))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features from the finest level to the coarsest."""
        fine = self.fine(self.stem(images - 0.5))
        middle = self.middle(fine)
        levels = [fine, middle, self.coarse(middle)]
        levels = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0)
        return levels
