"""Image classifiers: networks for small images, and those of torchvision.models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_graft.config import ModelConfig
from dist_graft.config.validation import fitting_kwargs, own
from dist_graft.errors import ConfigError, user_code
from dist_graft.references import is_reference
from dist_graft.training.models.mobilenetv2 import MobileNetV2
from dist_graft.training.models.resnet import ResNet
from dist_graft.training.models.vgg import VGG16
from dist_graft.training.models.wide_resnet import WideResNet

__all__ = ["build_model", "check_model_name", "model_names"]

_RESNET_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
_OTHERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2": MobileNetV2,
    "vgg16_bn": VGG16,
    "wrn28_10": partial(WideResNet, 28, 10),
}


def model_names() -> list[str]:
    """Names of the networks for small images; `build_model` also accepts torchvision's."""
    return [*_RESNET_DEPTHS, *_OTHERS]


_LOADING = {
    *("weights", "weights_backbone", "pretrained", "pretrained_backbone"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
}
"""Arguments with which torchvision and timm download or unpickle weights."""


def check_model_name(name: str) -> None:
    """Raise ConfigError, listing similar names, unless `build_model` knows the model."""
    if is_reference(name):
        own("model.name", name)
    elif name.startswith("timm/"):
        from dist_graft.training.models import timm_names

        timm_names.check(name)
    elif name not in model_names():
        from dist_graft.training.models import torchvision_names

        torchvision_names.check(name, own_names=model_names())


def build_model(config: ModelConfig, *, num_classes: int, channels: int) -> nn.Module:
    """Build an image classifier, initialized from torch's global generator.

    The name is one of `model_names()`, a classifier of torchvision.models (without pretrained
    weights; "torchvision/NAME" if both have the name), "timm/NAME", or "package.module:name" of a
    user-defined function that is called with num_classes and channels. config.kwargs are passed,
    too. torchvision is not imported for `model_names()`.

    Returns: a module from images [N, channels, H, W] to logits [N, num_classes].

    Raises:
        ConfigError: the name is unknown (the message suggests similar ones) or not an image
            classifier, config.activation is set for a network without that option, or
            config.kwargs do not fit; FunctionError if a user-defined function fails.
    """
    name = config.name
    if is_reference(name):
        return _build_custom(config, num_classes=num_classes, channels=channels)
    if loading := sorted(_LOADING & set(config.kwargs)):
        raise ConfigError(
            f"model.kwargs must not load weights, got {loading[0]}: use init_from, which reads "
            "nothing but tensors"
        )
    if config.activation != "relu" and name not in _RESNET_DEPTHS:
        raise ConfigError(
            f"model.activation {config.activation!r} requires one of {', '.join(_RESNET_DEPTHS)}; "
            f"model.name is {name!r}"
        )
    if name in model_names():
        return _build_own(config, num_classes=num_classes, channels=channels)

    if name.startswith("timm/"):
        from dist_graft.training.models import timm_names

        return timm_names.build(
            name, num_classes=num_classes, channels=channels, kwargs=config.kwargs
        )

    from dist_graft.training.models import torchvision_names

    return torchvision_names.build(
        name,
        num_classes=num_classes,
        channels=channels,
        kwargs=config.kwargs,
        own_names=model_names(),
    )


def _build_own(config: ModelConfig, *, num_classes: int, channels: int) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": num_classes, "channels": channels}
    function = _OTHERS.get(config.name)
    if function is None:
        function = partial(ResNet, _RESNET_DEPTHS[config.name])
        arguments["activation"] = config.activation
    with fitting_kwargs(config.name, config.kwargs):
        return function(**arguments, **config.kwargs)


def _build_custom(config: ModelConfig, *, num_classes: int, channels: int) -> nn.Module:
    if config.activation != "relu":
        raise ConfigError(
            f"model.activation {config.activation!r} does not apply to the user-defined model "
            f"{config.name!r}: leave it unset"
        )
    function = own("model.name", config.name)
    with user_code(f"model.name {config.name}"):
        model = function(num_classes=num_classes, channels=channels, **config.kwargs)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name {config.name!r} must return an nn.Module, got {model!r}")
    return model


def to_channels_last(model: nn.Module) -> None:
    """Give all 4-D parameters and buffers the memory format channels_last, in place.

    `Module.to(memory_format=...)` would try the same with those of 3-D convolutions, and fail.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
