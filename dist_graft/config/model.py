"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the networks."""

    name: str = "resnet20"
    """resnet8/14/20/32/44/56/110, mobilenetv2, vgg16_bn, wrn28_10 (for small images), any
    classifier of torchvision.models (torchvision/NAME if both have that name), timm/NAME, or
    package.module:name of a function (num_classes, channels) -> nn.Module."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's function, as a YAML mapping; for models of torchvision,
    timm, and your own."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Activation of the small-image ResNets."""
    shared_init: bool = False
    """Initialize all networks with the same weights."""
