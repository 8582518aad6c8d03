"""VGG for small images (Simonyan and Zisserman, arXiv 1409.1556, configuration D)."""

from __future__ import annotations

from torch import Tensor, nn

from dist_graft.training.models.initialization import he_normal_

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 with batch norm and one linear layer instead of the paper's three.

    Images may have any size: the five poolings round up, and the remaining pixels (one for sizes 28
    and 32) are averaged. 4,224 filters; 14,724,042 parameters with 10 classes and 3 channels.
    Convolutions have no bias, which batch norm would cancel. He initialization over fan_out.
    """

    def __init__(self, *, num_classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for widths in _STAGES:
            for width in widths:
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)
        he_normal_(self, fan="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, channels, H, W]."""
        logits: Tensor = self.linear(self.features(images).mean((2, 3)))
        return logits
