"""Small nets with BatchNorm for 32 x 32 pictures, as transformers' Trainer takes them."""

from __future__ import annotations

from typing import Any

import torch
from soups.resnet20 import Block
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def resnet(width: int) -> nn.Sequential:
    """Return a ResNet-8: three blocks of `width`, `2 width`, `4 width` channels, at 16, 8 and 4 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def vgg(width: int) -> nn.Sequential:
    """Return a VGG-like net of four convolutions (Simonyan and Zisserman 2014), each with BatchNorm."""

    def conv(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *conv(3, width),
        nn.MaxPool2d(2),
        *conv(width, 2 * width),
        nn.MaxPool2d(2),
        *conv(2 * width, 4 * width),
        *conv(4 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


NETS = {"resnet": resnet, "vgg": vgg}
WIDTHS = {"resnet": 32, "vgg": 24}
"""Wide enough to fit a few thousand pictures, as the nets of the paper fit theirs."""


class Classifier(nn.Module):
    """A net that returns its loss, as Trainer wants it."""

    def __init__(self, net: str, width: int) -> None:
        super().__init__()
        self.net = NETS[net](width).to(memory_format=torch.channels_last)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.net(pixel_values.contiguous(memory_format=torch.channels_last))
        found: dict[str, Any] = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        return found
