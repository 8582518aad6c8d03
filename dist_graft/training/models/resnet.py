"""Residual networks for small images (He et al., arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dist_graft.training.models.initialization import he_normal_

Activation = Literal["relu", "leaky_relu"]


def _activation(name: Activation) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(inplace=True)


class _Block(nn.Module):
    """Basic block; the shortcut is option A (without parameters) if the width grows."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.activation = _activation(activation)
        self.stride = stride
        self.new_channels = width - inputs

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images
        if self.new_channels:
            subsampled = images[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))
        hidden = self.activation(self.bn1(self.conv1(images)))
        summed: Tensor = self.activation(self.bn2(self.conv2(hidden)) + shortcut)
        return summed


class ResNet(nn.Module):
    """ResNet of depth 6n + 2: three stages of n blocks with 1, 2 and 4 times `width` filters.

    Images may have any size. The first convolution has stride `stem_stride`; with 2, training
    costs about a quarter. A shortcut between stages subsamples and pads with zero channels
    (option A). With the default width, ResNet-32 has 464,154 parameters and 1,136 filters with 10
    classes and 3 channels. The negative slope of leaky_relu is 0.01. He initialization over fan_in.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        channels: int,
        activation: Activation = "relu",
        width: int = 16,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if min(width, stem_stride) < 1:
            raise ValueError(f"width {width} and stem_stride {stem_stride} must be at least 1")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.activation = _activation(activation)
        self.layer1 = _stage(width, width, 1, blocks, activation)
        self.layer2 = _stage(width, 2 * width, 2, blocks, activation)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks, activation)
        self.linear = nn.Linear(4 * width, num_classes)
        he_normal_(self, fan="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, channels, H, W]."""
        hidden = self.activation(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.linear(hidden.mean((2, 3)))
        return logits


def _stage(
    inputs: int, width: int, stride: int, blocks: int, activation: Activation
) -> nn.Sequential:
    first = _Block(inputs, width, stride, activation)
    return nn.Sequential(first, *(_Block(width, width, 1, activation) for _ in range(blocks - 1)))
