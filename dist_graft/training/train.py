"""Train a population of networks on this machine with one call."""

from __future__ import annotations

import json
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.errors import RunDirectoryError
from dist_graft.population.runtime.launch import launch
from dist_graft.run_directory import RunDirectory
from dist_graft.training.trainer import Trainer


def train(config: TrainConfig | None = None, *, networks: int = 1) -> dict[str, Any]:
    """Train a population on this machine; the same as ``dist-graft train --networks K``.

    Starts one process for each network (``runtime.replicas`` processes with replicas) with
    `dist_graft.launch`; a single process trains in the calling one. In a script, call this under
    ``if __name__ == "__main__":``. For a model, data or loss of your own, see `Trainer`.

    Args:
        config: all options.
        networks: size of the population.

    Returns: the content of ``summary.json``, also if the run had already been completed; empty if
        that file was removed since.

    Raises: as `launch` and `Trainer.fit`: NetworkFailedError, whose message is that of the first
        failure; StoppedEarlyError when the run was asked to stop and can be resumed.
    """
    config = config or TrainConfig()
    replicas = config.runtime.replicas
    if networks == replicas == 1:
        return _fit(config)
    return launch(_fit, config, networks=networks, replicas=replicas)[0]


def _fit(config: TrainConfig) -> dict[str, Any]:
    trainer = Trainer(config)
    trainer.fit()
    return trainer.summary or _read_summary(trainer.directory)


def _read_summary(directory: RunDirectory) -> dict[str, Any]:
    """Content of the summary.json of a complete run; of a job, its own until all have finished."""
    path = directory.summary if directory.summary.exists() else directory.summary_job
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}): restore or remove it") from error
