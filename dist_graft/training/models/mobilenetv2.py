"""MobileNetV2 for small images (Sandler et al., arXiv 1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn

from dist_graft.training.models.initialization import he_normal_

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, width, blocks, stride of the first block: table 2 with stride 1 in the second row."""


class _Block(nn.Module):
    """Inverted residual: expand (1x1), depthwise convolution (3x3), project (1x1, linear)."""

    def __init__(self, inputs: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.residual = stride == 1
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))
            if self.residual and inputs != width
            else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        projected: Tensor = self.bn3(self.conv3(hidden))
        return projected + self.shortcut(images) if self.residual else projected


class MobileNetV2(nn.Module):
    """MobileNetV2 with stride 1 in the stem and the second stage, as is common for CIFAR.

    Images may have any size. Every block with stride 1 is residual; the four of them that change
    the width use a 1x1 convolution and batch norm as shortcut. 17,544 filters, 17,088 without these
    four; 2,296,922 parameters with 10 classes and 3 channels. ReLU instead of the paper's ReLU6,
    which is meant for low-precision arithmetic; no dropout. He initialization over fan_in, because
    torch computes fan_out of a depthwise convolution as if it were dense.
    """

    def __init__(self, *, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, width, repeats, first_stride in _STAGES:
            for stride in (first_stride,) + (1,) * (repeats - 1):
                blocks.append(_Block(inputs, width, expansion, stride))
                inputs = width
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)
        he_normal_(self, fan="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, channels, H, W]."""
        hidden = self.layers(self.relu(self.bn1(self.conv1(images))))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        logits: Tensor = self.linear(hidden.mean((2, 3)))
        return logits
