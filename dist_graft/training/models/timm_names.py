"""Models of timm by name. Importing this module imports timm (extra "timm")."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_graft.config.validation import fitting_kwargs, nearest_names
from dist_graft.errors import ConfigError

try:
    import timm
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"models of timm need the package {missing.name}: pip install 'dist_graft[timm]'"
    ) from missing


def check(name: str) -> None:
    """Raise ConfigError, listing similar names, unless timm has the model "timm/NAME"."""
    bare = name.removeprefix("timm/")
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models())
        raise ConfigError(
            f"model.name {name!r} is unknown; "
            f"{nearest_names([f'timm/{known}' for known in near])}timm.list_models() lists all"
        )


def build(name: str, *, num_classes: int, channels: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build "timm/NAME" without pretrained weights; kwargs are passed to `timm.create_model`.

    Raises:
        ConfigError: timm has no model of this name, or rejects kwargs.
    """
    check(name)
    with fitting_kwargs(name, kwargs):
        model: nn.Module = timm.create_model(
            name.removeprefix("timm/"), num_classes=num_classes, in_chans=channels, **kwargs
        )
    return model


def pretrained_file(model_name: str, weights: str) -> tuple[Path | None, str]:
    """File of pretrained weights in the Hugging Face cache, and the address to get it from.

    Args:
        model_name: "timm/NAME".
        weights: "DEFAULT", or a tag of the model such as "a1_in1k".

    Returns:
        None instead of the path if the file is not in the cache.

    Raises:
        ConfigError: timm has no such weights.
    """
    import huggingface_hub

    name = model_name.removeprefix("timm/")
    if model_name == name or not timm.is_model(name):
        raise ConfigError(
            f"init_from timm:{weights} requires a model of timm, and model.name is {model_name!r}"
        )
    if weights != "DEFAULT":
        name = f"{name.partition('.')[0]}.{weights}"
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the model has other tags
        config = None
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"init_from timm:{weights}: timm has no such weights for {model_name}")
    file = config.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file)
    url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
    return (Path(cached) if isinstance(cached, str) else None), url
