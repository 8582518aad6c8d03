"""Wide residual networks for small images (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn

from dist_graft.training.models.initialization import he_normal_


class _Block(nn.Module):
    """Pre-activation block; if the width changes, the shortcut starts after the activation.

    Modules are registered in the order of computation, so that in the state dict each batch norm
    follows the 3x3 convolution that it normalizes.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Conv2d(inputs, width, 1, stride=stride, bias=False) if inputs != width else None
        )
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        activated = self.relu(self.bn1(images))
        shortcut = images if self.shortcut is None else self.shortcut(activated)
        residual = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        summed: Tensor = residual + shortcut
        return summed


class WideResNet(nn.Module):
    """Wide ResNet of depth 6n + 4: three stages of n blocks, 16, 32 and 64 times factor wide.

    Images may have any size. WRN-28-10 has 36,479,194 parameters with 10 classes and 3 channels. No
    dropout. He initialization over fan_out.
    """

    def __init__(self, depth: int, factor: int, *, num_classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * factor, 1, blocks)
        self.layer2 = _stage(16 * factor, 32 * factor, 2, blocks)
        self.layer3 = _stage(32 * factor, 64 * factor, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * factor)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(64 * factor, num_classes)
        he_normal_(self, fan="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, channels, H, W]."""
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.linear(self.relu(self.bn(hidden)).mean((2, 3)))
        return logits


def _stage(inputs: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    first = _Block(inputs, width, stride)
    return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))
