"""The networks that can be trained: a small zoo for small images, and torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from dist_graft.config import ModelConfig
from dist_graft.config.validation import own
from dist_graft.errors import ConfigError
from dist_graft.references import is_reference
from dist_graft.training.models.mobilenetv2 import MobileNetV2
from dist_graft.training.models.resnet import ResNet
from dist_graft.training.models.vgg import VGG16
from dist_graft.training.models.wide_resnet import WideResNet

__all__ = ["build_model", "model_names"]

_RESNET_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
_OTHERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2": MobileNetV2,
    "vgg16_bn": VGG16,
    "wrn28_10": partial(WideResNet, 28, 10),
}


def model_names() -> list[str]:
    """Names of the small-image networks; build_model knows those of torchvision.models too."""
    return [*_RESNET_DEPTHS, *_OTHERS]


def build_model(config: ModelConfig, *, num_classes: int, channels: int) -> nn.Module:
    """Build the network that config names, with first weights from torch's global generator.

    It turns images [N, channels, H, W] into logits [N, num_classes]. A name of model_names()
    means that network, any other one of torchvision.models, without pretrained weights;
    "torchvision/NAME" means torchvision's where both have the name. torchvision is imported only
    for its own networks and for unknown names. "package.module:name" names a function of the user's
    that is called with num_classes and channels.

    Raises:
        ConfigError: the name is unknown (the message has the nearest ones) or is no image
            classifier, or config.activation is set for a network that has no such choice.
    """
    name = config.name
    if is_reference(name):
        return _build_own(config, num_classes=num_classes, channels=channels)
    if name in _RESNET_DEPTHS:
        return ResNet(
            _RESNET_DEPTHS[name],
            num_classes=num_classes,
            channels=channels,
            activation=config.activation,
        )
    if config.activation != "relu":
        raise ConfigError(
            f"model.activation {config.activation!r} needs one of {', '.join(_RESNET_DEPTHS)}; "
            f"model.name is {name!r}"
        )
    if name in _OTHERS:
        return _OTHERS[name](num_classes=num_classes, channels=channels)

    from dist_graft.training.models import torchvision_names

    return torchvision_names.build(
        name, num_classes=num_classes, channels=channels, own_names=model_names()
    )


def _build_own(config: ModelConfig, *, num_classes: int, channels: int) -> nn.Module:
    if config.activation != "relu":
        raise ConfigError("model.activation is for our own ResNets: give it to your function")
    model = own("model.name", config.name)(num_classes=num_classes, channels=channels)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name {config.name!r} must return a torch module, got {model!r}")
    return model
