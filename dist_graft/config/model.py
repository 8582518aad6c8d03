"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture that all networks share."""

    name: str = "resnet20"
    """resnet8/14/20/32/44/56/110, mobilenetv2, vgg16_bn, wrn28_10 (all for small images), or any
    name of torchvision.models (torchvision/NAME where both have it); or package.module:name of a
    function (num_classes, channels) -> torch module."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Of the small-image ResNets."""
    shared_init: bool = False
    """Start all networks from the same weights instead of each from its own."""
