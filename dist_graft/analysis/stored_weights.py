"""Reads weights from disk: runs, checkpoints, exported folders and single files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_graft.analysis.run_files import read_json
from dist_graft.config import ModelConfig, TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.grafting.units import Lead
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import (
    COMPLETE,
    Checkpoint,
    complete_checkpoints,
    job_checkpoints,
    load_network,
    network_file,
    run_of_checkpoint,
)
from dist_graft.training.data.preprocessing import DAMAGED, Preprocessing
from dist_graft.training.models import build_model
from dist_graft.training.weights import (
    EXPORT_DESCRIPTION,
    State,
    exported_files,
    read_description,
    read_weights,
)

_NETWORK = re.compile(r"network(\d+)")


@dataclass(frozen=True)
class StoredRun:
    """A run directory and one complete checkpoint of each network."""

    path: Path
    config: TrainConfig
    members: Mapping[int, Checkpoint]
    """Checkpoint of each network: the same, unless each network is an independent job."""
    population: int
    """Size of the population. Networks that are independent jobs may have no checkpoint yet."""
    custom: Collection[str] = ()
    """Parts of the run that were passed in Python, such as "model", instead of configured."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the network that has trained farthest."""
        return max(self.members.values(), key=lambda checkpoint: checkpoint.epoch)

    @property
    def networks(self) -> list[int]:
        """Numbers of the networks that have a checkpoint."""
        return sorted(self.members)

    @property
    def inputs(self) -> dict[str, Any]:
        """Content of classes.json; empty for the user's own data, and in older runs.

        Raises: RunDirectoryError if it is damaged.
        """
        path = RunDirectory(self.path).classes
        if not path.exists():
            return {}
        content = read_json(path)
        try:
            classes = [str(name) for name in content["classes"]]
            preprocessing = Preprocessing.from_json(content["preprocessing"])
        except DAMAGED as error:
            raise RunDirectoryError(f"{path} cannot be read: {error}") from error
        return {"classes": classes, "preprocessing": asdict(preprocessing)}

    @property
    def shape(self) -> tuple[int, int] | None:
        """Numbers of classes and channels; None: unknown."""
        inputs = self.inputs
        return (len(inputs["classes"]), inputs["preprocessing"]["channels"]) if inputs else None

    def require_configured(self, *parts: str) -> None:
        """Raise ConfigError if one of these parts of the run was given in Python."""
        custom = [part for part in parts if part in self.custom]
        if custom:
            raise ConfigError(
                f"{self.path} was trained in Python with its own {', '.join(custom)}, which this "
                "command cannot build: run dist-graft export, and load the weights in Python"
            )

    def state(self, network: int) -> State:
        """Load the weights of one network onto the CPU.

        Raises: RunDirectoryError if the file is missing or damaged.
        """
        state: State = self._load(network)["model"]
        return state

    def averaged_state(self, network: int) -> State | None:
        """Load the moving average of one network's weights; None if the run has none."""
        saved = self._load(network).get("ema")
        if saved is None:
            return None
        prefix = "module."  # of torch.optim.swa_utils.AveragedModel
        return {
            key.removeprefix(prefix): value
            for key, value in saved.items()
            if key.startswith(prefix)
        }

    def _load(self, network: int) -> dict[str, Any]:
        name = network_file(network)
        path = self.members[network].path / name
        try:
            return load_network(path, self.members[network].sha256[name])
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"{path} is missing or damaged: restore it, or choose another checkpoint with "
                "--checkpoint"
            ) from error

    def states(self) -> Iterator[State]:
        """Load the weights of all networks, one at a time."""
        return (self.state(network) for network in self.networks)


def open_run(path: Path, checkpoint: str | None = None) -> StoredRun:
    """Open a run at a checkpoint, by default the latest complete one of each network.

    Raises: RunDirectoryError if there is no run or no such checkpoint.
    """
    directory = RunDirectory(path)
    config, networks = directory.read_config()
    together = complete_checkpoints(directory.checkpoints)
    by_network = job_checkpoints(path)
    if together:  # the networks may have changed between two checkpoints
        chosen = [each for each in together if checkpoint in (None, each.path.name)] or together
        by_network = dict.fromkeys(chosen[-1].numbers, chosen)
        networks = chosen[-1].networks
    if not by_network:
        raise RunDirectoryError(f"{path} holds no complete checkpoint")
    members = {
        network: found[-1]
        for network, stored in by_network.items()
        if (found := [each for each in stored if checkpoint in (None, each.path.name)])
    }
    if not members:
        names = sorted({each.path.name for stored in by_network.values() for each in stored})
        raise RunDirectoryError(
            f"{path} holds no complete checkpoint {checkpoint!r}, only {', '.join(names)}"
        )
    return StoredRun(path, config, members, networks, directory.read_custom())


@dataclass(frozen=True)
class Source:
    """Networks of one architecture that are inspected together."""

    path: Path
    model: ModelConfig
    lead: Lead
    states: Mapping[str, State]
    """State dicts by network number, or by the file's name if it contains no number."""
    shape: tuple[int, int] | None = None
    """Numbers of classes and channels; None: unknown."""


def read_source(path: Path, model_name: str | None = None) -> Source:
    """Read all weights at a path.

    Of a run directory, the latest complete checkpoint is read. The architecture comes from the
    configuration of the run, or from export.json beside the file.

    Args: model_name: architecture of a file that has neither.
    Raises: RunDirectoryError if there is nothing to read; ConfigError if a file's architecture is
        unknown.
    """
    if not path.exists():
        raise RunDirectoryError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    if (folder / COMPLETE).is_file():
        return _from_checkpoint(path, folder)
    if (folder / EXPORT_DESCRIPTION).is_file():
        return _from_export(path, folder, exported_files(path) if path.is_dir() else [path])
    if path.is_dir():
        return _from_run(path, open_run(path))
    if model_name is None:
        raise ConfigError(
            f"{path} is neither in a run nor in an exported folder, so its architecture is "
            "unknown: give --model.name"
        )
    return Source(path, ModelConfig(name=model_name), "conv", {_name(path): read_weights(path)})


def owner(path: Path) -> Path:
    """Folder to which results about a source belong: its run, its export, or that of its file."""
    folder = path if path.is_dir() else path.parent
    return run_of_checkpoint(folder.resolve()) if (folder / COMPLETE).is_file() else folder


def labels(paths: Sequence[Path]) -> list[str]:
    """Short unique names of the paths, without their common parent.

    Raises: ConfigError if a path is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, absolute in zip(paths, resolved, strict=True):
        if resolved.count(absolute) > 1:
            raise ConfigError(f"{path} is given twice")
    shared = os.path.commonpath([path.parent for path in resolved])
    return [
        "/".join(part for part in path.relative_to(shared).parts if part != "checkpoints")
        for path in resolved
    ]


def architecture(
    config: ModelConfig, state: State, source: Path, shape: tuple[int, int] | None = None
) -> nn.Module:
    """Build the module of a state dict.

    Args:
        config: of the model.
        state: copied into the module.
        source: file of the state dict, for errors.
        shape: numbers of classes and channels; None: those of the first and last weights.

    Raises: ConfigError if the weights do not fit the architecture.
    """
    classes, channels = shape or classes_and_channels(state, source)
    model = build_model(config, num_classes=classes, channels=channels)
    load_state(model, state, source)
    return model


def classes_and_channels(state: State, source: Path) -> tuple[int, int]:
    """Guess the numbers of classes and channels from the last and first weights.

    Raises: ConfigError if these cannot be those of an image classifier.
    """
    weights = [tensor for tensor in state.values() if tensor.dim() >= 2]
    images = [tensor for tensor in weights if tensor.dim() == 4]
    if not images or images[0].shape[1] not in (1, 3):
        raise ConfigError(f"{source} holds no classifier of images with 1 or 3 channels")
    return len(weights[-1]), images[0].shape[1]


def load_state(model: nn.Module, state: State, source: Path) -> None:
    """Copy weights into a module in place.

    Raises: ConfigError naming the first tensor that does not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ConfigError(
            f"{source} does not hold the weights of this architecture: {first[0].strip()}"
        ) from error


def _from_checkpoint(path: Path, folder: Path) -> Source:
    """All networks of a checkpoint, or the one with the file `path`."""
    folder = folder.resolve()
    run = open_run(run_of_checkpoint(folder), folder.name)
    numbers = [network for network in run.networks if run.members[network].path == folder]
    if path.resolve() == folder:
        return _from_run(path, run, numbers)
    if _name(path) not in map(str, numbers):
        raise RunDirectoryError(f"{path} is not a network of {folder}")
    return _from_run(path, run, [int(_name(path))])


def _from_run(path: Path, run: StoredRun, networks: Sequence[int] | None = None) -> Source:
    run.require_configured("model")
    chosen = run.networks if networks is None else networks
    states = {str(network): run.state(network) for network in chosen}
    return Source(path, run.config.model, run.config.graft.lead, states, run.shape)


def _from_export(path: Path, folder: Path, files: Sequence[Path]) -> Source:
    description = read_description(folder)
    model, shape = exported_model(description, folder)
    states = {_name(file): read_weights(file) for file in files}
    return Source(path, model, description["lead"], states, shape)


def exported_model(
    description: Mapping[str, Any], folder: Path
) -> tuple[ModelConfig, tuple[int, int] | None]:
    """Options of an exported model, and its numbers of classes and channels if they are known.

    Raises: ConfigError if the model was built in Python.
    """
    if description["model"] is None:
        raise ConfigError(
            f"{folder} holds a model that was built in Python, which dist_graft cannot build: load "
            "it with dist_graft.load(path, model=your_module)"
        )
    try:
        arguments = dict(description.get("model_arguments") or {})  # missing in older exports
        shape = arguments.pop("num_classes", None), arguments.pop("channels", None)
        model = ModelConfig(name=description["model"], **arguments)
        return model, None if None in shape else (int(shape[0]), int(shape[1]))
    except (TypeError, ValueError) as error:
        raise RunDirectoryError(f"{folder / EXPORT_DESCRIPTION} cannot be read: {error}") from error


def _name(path: Path) -> str:
    number = _NETWORK.fullmatch(path.stem)
    return str(int(number.group(1))) if number else path.stem
