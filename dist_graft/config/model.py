"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_graft.config.validation import check_kwargs, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the networks."""

    name: str = "resnet20"
    """resnet8/14/20/32/44/56/110, mobilenetv2, vgg16_bn, wrn28_10 (for small images), any
    classifier of torchvision.models (torchvision/NAME if both have that name), timm/NAME, or
    package.module:name of a function (num_classes, channels) -> nn.Module."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the model's function, as a YAML mapping, e.g. {width: 8, stem_stride:
    2} for resnet8 to resnet110."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Activation of the small-image ResNets."""
    shared_init: bool = False
    """Initialize all networks with the same weights."""
    dropout: float | None = None
    """Probability of the model's dropout layers, in [0, 1); unset: as the model defines it.
    Requires a model with dropout layers."""

    def __post_init__(self) -> None:
        check_kwargs("model.kwargs", self.kwargs, {"num_classes": "data", "channels": "data"})
        if self.dropout is not None:
            require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
