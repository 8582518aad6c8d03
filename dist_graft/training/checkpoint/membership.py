"""A run that resumes with other networks: which network of the checkpoint each one continues."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import Checkpoint, complete_checkpoints


@dataclass(frozen=True)
class Origin:
    """Where a network of the resumed run starts."""

    network: int
    """Network of the checkpoint whose file is read."""
    kind: Literal["continue", "copy", "fresh"]
    """continue: with all of its state; copy: with its weights; fresh: with new weights, at its
    epoch."""

    def __str__(self) -> str:
        weights = {
            "continue": "continuing network {}",
            "copy": "starting from the weights of network {}",
            "fresh": "starting from new weights at the position of network {}",
        }
        return f"{weights[self.kind].format(self.network)} of the checkpoint"


def changes_networks(
    requested: Sequence[int | str] | None, checkpoint: Checkpoint, networks: int
) -> bool:
    """Whether `resume_networks` still has to be applied to a checkpoint.

    Checkpoints of the changed run store the request, so the same command resumes it.

    Args: networks: number of networks that were started.
    """
    done = checkpoint.resumed_networks, checkpoint.networks
    return requested is not None and done != (list(requested), networks)


def origin(requested: Sequence[int | str], checkpoint: Checkpoint, *, network: int) -> Origin:
    """Where a network starts.

    Args:
        requested: `resume_networks`. Networks beyond it copy its networks in turn.
        checkpoint: to resume from.
        network: number in the resumed run.

    Raises: ConfigError if the checkpoint lacks one of the requested networks.
    """
    numbers = [entry for entry in requested if isinstance(entry, int)]
    for number in numbers:
        if number >= checkpoint.networks:
            raise ConfigError(
                f"resume_networks names network {number}, but {checkpoint.path} holds networks 0 "
                f"to {checkpoint.networks - 1}"
            )
    if network >= len(requested):
        return Origin(numbers[(network - len(requested)) % len(numbers)], "copy")
    entry = requested[network]
    return Origin(entry, "continue") if isinstance(entry, int) else Origin(numbers[0], "fresh")


def pending_change(
    directory: RunDirectory, config: TrainConfig, networks: int
) -> Checkpoint | None:
    """Checkpoint to which `resume_networks` still has to be applied, if any; for rank 0.

    Raises: ConfigError for a request that does not fit.
    """
    requested = config.resume_networks
    if requested is None:
        return None
    if len(requested) > networks:
        raise ConfigError(
            f"resume_networks names {len(requested)} networks, but {networks} were started: start "
            f"at least {len(requested)}"
        )
    complete = complete_checkpoints(directory.checkpoints)
    if not complete:
        raise ConfigError(f"resume_networks requires a checkpoint, and {directory.path} holds none")
    newest = complete[-1]
    if not changes_networks(requested, newest, networks):
        return None
    for network in range(networks):
        origin(requested, newest, network=network)
    if newest.epoch >= config.epochs:
        raise ConfigError(
            f"resume_networks has nothing to train: {newest.path} is after epoch {newest.epoch} of "
            f"{config.epochs}; raise --epochs"
        )
    return newest


def archive_networks(directory: RunDirectory, checkpoint: Checkpoint) -> None:
    """Move the networks' folders to RUN/before_NAME/, where NAME is the checkpoint's.

    Their metrics and logs belong to networks that now have another number. Folders that are there
    already were moved by an earlier attempt; since then only epochs that are trained again ended.
    """
    archive = directory.path / f"before_{checkpoint.path.name}"
    try:
        archive.mkdir(exist_ok=True)
        for number in range(checkpoint.networks):
            folder = directory.network(number)
            target = archive / folder.name
            with contextlib.suppress(FileNotFoundError):
                if not target.exists():
                    folder.rename(target)
    except OSError as error:
        raise RunDirectoryError(
            f"{archive} cannot be written: {error.strerror}; free disk space, and rerun the command"
        ) from error
