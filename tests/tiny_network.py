"""A network of under 1,000 weights, named as package.module:name on the command line."""

from __future__ import annotations

from torch import nn


class TinyNetwork(nn.Sequential):
    """Two convolutions with batch norm, and one linear layer."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, num_classes),
        )
