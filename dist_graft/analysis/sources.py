"""What can be inspected: runs, checkpoint sets, exported folders, single files of weights."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_graft.analysis.export import DESCRIPTION
from dist_graft.analysis.stored_run import State, StoredRun, open_run
from dist_graft.config import ModelConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.grafting.units import Lead
from dist_graft.training.checkpoint.files import COMPLETE

_NETWORK = re.compile(r"network(\d+)")


@dataclass(frozen=True)
class Source:
    """Networks of one architecture, that are shown together."""

    path: Path
    model: ModelConfig
    lead: Lead
    states: Mapping[str, State]
    """By the network's number, or by the file's name when that has none."""


def read_source(path: Path, model_name: str | None = None) -> Source:
    """Read what a path names.

    A run directory means its newest complete set; a file alone the one network in it. The
    architecture is the run's, or that of the export.json beside a file.

    Args: model_name: architecture of a file that has neither.
    Raises: RunDirectoryError when nothing can be read there; ConfigError when a file's architecture
        is not known.
    """
    if (path / COMPLETE).is_file():
        return _of_set(path, path)
    if (path / DESCRIPTION).is_file():
        return _exported(path, path, sorted(path.glob("network*.pt")))
    if path.is_dir():
        return _of_run(path, open_run(path))
    if not path.is_file():
        raise RunDirectoryError(f"{path} does not exist")
    if (path.parent / COMPLETE).is_file():
        return _of_set(path, path.parent)
    if (path.parent / DESCRIPTION).is_file():
        return _exported(path, path.parent, [path])
    if model_name is None:
        raise ConfigError(
            f"{path} lies in no run and no exported folder, so its architecture is not known: pass "
            "--model.name"
        )
    return Source(path, ModelConfig(name=model_name), "conv", {_name(path): read_weights(path)})


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names of the paths: what they do not share.

    Raises: ConfigError when a path is given twice.
    """
    whole = [path.resolve() for path in paths]
    for path, resolved in zip(paths, whole, strict=True):
        if whole.count(resolved) > 1:
            raise ConfigError(f"{path} is given twice")
    shared = os.path.commonpath([path.parent for path in whole])
    return [
        "/".join(part for part in path.relative_to(shared).parts if part != "checkpoints")
        for path in whole
    ]


def read_weights(path: Path) -> State:
    """A state dict, plain or as a checkpoint holds it; nothing but tensors is unpickled.

    Raises: RunDirectoryError when the file holds none.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[:1] or [type(error).__name__]
        raise RunDirectoryError(f"{path} cannot be read as weights: {first[0]}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise RunDirectoryError(f"{path} holds no state dict")
    return state


def _of_set(path: Path, folder: Path) -> Source:
    """All networks of a checkpoint set in its run directory, or the one whose file the path is."""
    folder = folder.resolve()
    run = open_run(folder.parents[1], folder.name)
    if path.resolve() == folder:
        return _of_run(path, run)
    if path.name not in run.checkpoint.sha256:
        raise RunDirectoryError(f"{path} is no network of {folder}")
    return _of_run(path, run, [int(_name(path))])


def _of_run(path: Path, run: StoredRun, networks: Sequence[int] | None = None) -> Source:
    chosen = range(run.checkpoint.networks) if networks is None else networks
    states = {str(network): run.state(network) for network in chosen}
    return Source(path, run.config.model, run.config.graft.lead, states)


def _exported(path: Path, folder: Path, files: Sequence[Path]) -> Source:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        model, lead = ModelConfig(name=description["model"]), description["lead"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{folder / DESCRIPTION} cannot be read ({error})") from error
    if not files:
        raise RunDirectoryError(f"{folder} holds no networkNN.pt")
    return Source(path, model, lead, {_name(file): read_weights(file) for file in files})


def _name(path: Path) -> str:
    number = _NETWORK.fullmatch(path.stem)
    return str(int(number.group(1))) if number else path.stem
