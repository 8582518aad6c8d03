"""Image classifiers of torchvision by name. Importing this module imports torchvision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dist_graft.config.validation import fitting_kwargs, nearest_names
from dist_graft.errors import ConfigError

_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": _WITHOUT_AUXILIARY,
    "inception_v3": _WITHOUT_AUXILIARY,
}
"""Arguments that disable auxiliary outputs and a warning."""


def check(name: str, *, own_names: Sequence[str]) -> None:
    """Raise ConfigError unless torchvision has an image classifier "NAME" or "torchvision/NAME".

    The error lists similar names of torchvision and of `own_names`, the models of this package.
    """
    bare = name.removeprefix("torchvision/")
    if bare not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(_unknown_name(name, bare, own_names))


def build(
    name: str,
    *,
    num_classes: int,
    channels: int,
    kwargs: Mapping[str, Any],
    own_names: Sequence[str],
) -> nn.Module:
    """Build "NAME" or "torchvision/NAME" without pretrained weights, for 1 or 3 channels.

    For one channel, the weights of the first convolution are summed over its three channels: the
    output is that of the RGB network for three equal channels.

    kwargs are passed to torchvision's function. For an unknown name, own_names (the networks of
    this package) are among the suggestions.

    Raises:
        ConfigError: torchvision has no image classifier of this name, or it refuses kwargs.
    """
    assert channels in (1, 3)
    check(name, own_names=own_names)
    bare = name.removeprefix("torchvision/")
    arguments = {"num_classes": num_classes, **_OPTIONS.get(bare, {}), **kwargs}
    with fitting_kwargs(name, kwargs):
        model: nn.Module = torchvision.models.get_model(bare, **arguments)
    if channels == 1:
        _convert_to_grayscale(model)
    return model


def pretrained_file(model_name: str, weights: str) -> tuple[Path, str]:
    """File of pretrained weights in torch's hub cache, and the address to get it from.

    Args:
        model_name: "NAME" or "torchvision/NAME".
        weights: "DEFAULT", or another name of the model's weights.

    Raises:
        ConfigError: torchvision has no such model, or no weights of this name.
    """
    bare = model_name.removeprefix("torchvision/")
    try:
        known = torchvision.models.get_model_weights(bare)
    except ValueError as error:
        raise ConfigError(
            f"init_from torchvision:{weights} requires a model of torchvision, and model.name is "
            f"{model_name!r}"
        ) from error
    if weights not in known.__members__:
        raise ConfigError(
            f"init_from torchvision:{weights}: the weights of {bare} are "
            f"{', '.join(known.__members__)}"
        )
    url = str(known[weights].url)
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]), url


def _unknown_name(name: str, bare: str, own_names: Sequence[str]) -> str:
    if bare in torchvision.models.list_models():
        return (
            f"model.name {name!r} is a torchvision model, but not an image classifier: detection, "
            "segmentation, video, optical flow and quantized models are not supported"
        )
    classifiers = torchvision.models.list_models(module=torchvision.models)
    candidates = list(dict.fromkeys([*own_names, *classifiers]))
    nearest = difflib.get_close_matches(bare.lower(), candidates)
    if bare != name:
        nearest = [f"torchvision/{near}" if near in classifiers else near for near in nearest]
    return (
        f"model.name {name!r} is unknown; {nearest_names(nearest)}known: "
        f"{', '.join(own_names)}, timm/NAME, and any name of torchvision.models "
        "(python -c 'import torchvision.models as m; print(*m.list_models(module=m))')"
    )


def _convert_to_grayscale(model: nn.Module) -> None:
    first = next(
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    first.in_channels = 1
    first.weight = nn.Parameter(first.weight.detach().sum(1, keepdim=True))
