"""Networks as a run left them: the checkpoint set, and the module that its weights fit into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dist_graft.config import ModelConfig, TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.training.checkpoint.files import Checkpoint, complete_sets, load_network
from dist_graft.training.models import build_model
from dist_graft.training.run_directory import RunDirectory

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class StoredRun:
    """A run directory, and one complete checkpoint set of it."""

    path: Path
    config: TrainConfig
    checkpoint: Checkpoint

    def state(self, network: int) -> State:
        """Weights of one network, on the CPU.

        Raises: RunDirectoryError when the file is not the one that was saved.
        """
        name = f"network{network:02d}.pt"
        path = self.checkpoint.path / name
        try:
            saved = load_network(path, self.checkpoint.sha256[name])
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"{path} is missing or damaged: restore it, or name another set with --checkpoint"
            ) from error
        state: State = saved["model"]
        return state

    def states(self) -> Iterator[State]:
        """Weights of all networks, one after the other."""
        return (self.state(network) for network in range(self.checkpoint.networks))


def open_run(path: Path, checkpoint: str | None = None) -> StoredRun:
    """Find the newest complete checkpoint set of a run, or the one of a name.

    Raises: RunDirectoryError when there is no run, no complete set, or none of that name.
    """
    directory = RunDirectory(str(path))
    config, _ = directory.read()
    found = {stored.path.name: stored for stored in complete_sets(directory.checkpoints)}
    if not found:
        raise RunDirectoryError(f"{path} holds no complete checkpoint set")
    name = checkpoint or list(found)[-1]
    if name not in found:
        raise RunDirectoryError(
            f"{path} holds no complete checkpoint set {name!r}; it holds {', '.join(found)}"
        )
    return StoredRun(path, config, found[name])


def architecture(config: ModelConfig, state: State, source: Path) -> nn.Module:
    """The module that the weights belong to; classes and channels are read off the weights.

    Args: source: where the weights are from, for errors.
    Raises: ConfigError when the weights do not fit a network of that name.
    """
    weights = [tensor for tensor in state.values() if tensor.dim() >= 2]
    images = [tensor for tensor in weights if tensor.dim() == 4]
    if not images or images[0].shape[1] not in (1, 3):
        raise ConfigError(f"{source} holds no classifier of grey or colour images")
    model = build_model(config, num_classes=len(weights[-1]), channels=images[0].shape[1])
    fill(model, state, source)
    return model


def fill(model: nn.Module, state: State, source: Path) -> None:
    """Copy weights into a module, in place.

    Raises: ConfigError naming what does not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ConfigError(
            f"{source} does not hold the weights of this architecture: {first[0].strip()}"
        ) from error
