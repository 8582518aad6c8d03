"""Weights from disk: single files, and the initial weights of a run (`init_from`)."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_graft.config import TrainConfig
from dist_graft.config.train import is_named_weights
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.training.checkpoint.files import (
    COMPLETE,
    all_checkpoints,
    complete_checkpoints,
    job_checkpoints,
    load_network,
    network_file,
)

State = Mapping[str, Tensor]
"""A model's state dict."""

EXPORT_DESCRIPTION = "export.json"
"""File beside exported weights that describes them."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")
"""Endings of files of weights."""
_EXPORTED = re.compile(r"network\d+\.(safetensors|pt)")
_MAX_NAMED = 3


def read_weights(path: Path) -> State:
    """Read a state dict, plain or inside a checkpoint, without unpickling anything but tensors.

    Raises: RunDirectoryError if the file holds none.
    """
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        *(OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError),
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        first = str(error).splitlines()[:1] or [type(error).__name__]
        raise RunDirectoryError(f"{path} cannot be read as weights: {first[0]}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise RunDirectoryError(f"{path} holds no state dict")
    return state


def exported_files(folder: Path) -> list[Path]:
    """File of weights of each network in an exported folder, without moving averages and soups.

    Raises: RunDirectoryError if there is no valid export.json, or it describes no such file.
    """
    described = sorted(read_description(folder)["sha256"])  # .safetensors after .pt, and preferred
    files = {Path(name).stem: folder / name for name in described if is_network_file(name)}
    if not files:
        raise RunDirectoryError(
            f"{folder} holds no weights: export the run with --format safetensors"
        )
    return [files[stem] for stem in sorted(files, key=lambda stem: (len(stem), stem))]


def is_network_file(name: str) -> bool:
    """Whether an exported file has the weights of a network, not an average or a soup."""
    return _EXPORTED.fullmatch(name) is not None


def initialize(model: nn.Module, config: TrainConfig, network: int) -> str:
    """Copy the weights that `config.init_from` names into a network, in place.

    Args:
        model: the network's module.
        config: `init_from`, `init_strict` and the model's name.
        network: its number; of K networks in a run or export it takes number `network` modulo K.

    Returns: what was copied, in one line.
    Raises: ConfigError if there are no such weights or they do not fit; RunDirectoryError if a file
        is damaged.
    """
    source = config.init_from
    assert source
    state = _initial_state(source, config.model.name, network)
    own = model.state_dict()
    shapes = {
        key: f"{key} is {list(state[key].shape)} there and {list(tensor.shape)} here"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    }
    missing = {key: f"{key} is missing there" for key in own if key not in state}
    unknown = {key: f"{key} is unknown here" for key in state if key not in own}
    problems = [*shapes.values(), *missing.values(), *unknown.values()]
    fitting = {key: state[key] for key in own if key in state and key not in shapes}
    if not fitting:
        raise ConfigError(f"init_from {source} does not fit the model: none of its tensors matches")
    if problems and config.init_strict:
        raise ConfigError(
            f"init_from {source} does not fit the model: {_first(problems)}; init_strict false "
            "loads what fits and keeps the initialization of the rest"
        )
    model.load_state_dict(fitting, strict=False)
    line = f"initial weights from {source}: {len(fitting)} of {len(own)} tensors"
    if kept := [*shapes.values(), *missing.values()]:
        line += f"; left at their initialization: {_first(kept)}"
    if unknown:
        line += f"; not used: {_first(list(unknown))}"
    return line


def _first(texts: list[str]) -> str:
    more = len(texts) - _MAX_NAMED
    return f"{', '.join(texts[:_MAX_NAMED])}{f', and {more} more' if more > 0 else ''}"


def _initial_state(source: str, model_name: str, network: int) -> State:
    if is_named_weights(source):
        return read_weights(_pretrained_file(source, model_name))
    path = Path(source)
    if path.is_file():
        return read_weights(path)
    if not path.is_dir():
        raise ConfigError(f"init_from {source}: there is no such run, checkpoint, or file")
    if (path / EXPORT_DESCRIPTION).is_file():
        files = exported_files(path)
        return read_weights(files[network % len(files)])
    return _stored_state(path, network)


def _stored_state(path: Path, network: int) -> State:
    """Weights of a network of a run or of one checkpoint."""
    if (path / COMPLETE).is_file():
        folder = path.resolve()
        found = [each for each in all_checkpoints(folder.parent) if each.path == folder]
        members = {number: each for each in found for number in each.numbers if each.networks}
    elif together := complete_checkpoints(path / "checkpoints"):
        members = dict.fromkeys(together[-1].numbers, together[-1])
    else:
        members = {number: found[-1] for number, found in job_checkpoints(path).items()}
    if not members:
        raise ConfigError(f"init_from {path} holds no complete checkpoint")
    number = sorted(members)[network % len(members)]
    name = network_file(number)
    state: State = load_network(members[number].path / name, members[number].sha256[name])["model"]
    return state


def _pretrained_file(source: str, model_name: str) -> Path:
    library, _, weights = source.partition(":")
    path: Path | None
    if library == "timm":
        from dist_graft.training.models import timm_names

        path, url = timm_names.pretrained_file(model_name, weights)
        advice = f"copy {url} to a file and pass its path as init_from"
    else:
        from dist_graft.training.models import torchvision_names

        path, url = torchvision_names.pretrained_file(model_name, weights)
        advice = f"copy {url} to {path}"
    if path is None or not path.is_file():
        raise ConfigError(f"init_from {source}: the weights are not on this machine; {advice}")
    return path


def read_description(folder: Path) -> dict[str, Any]:
    """Content of export.json beside exported weights.

    Raises: RunDirectoryError if it is missing or damaged.
    """
    path = folder / EXPORT_DESCRIPTION
    try:
        description = json.loads(path.read_text())
        description["model"], description["lead"], dict(description["sha256"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    content: dict[str, Any] = description
    return content
