"""Jobs that train one network of a population each (graft.exchange files)."""

from __future__ import annotations

import contextlib

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, LeaseHeldError
from dist_graft.population.runtime.lease import Lease
from dist_graft.population.runtime.process_info import ProcessInfo, array_index
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints


def assign_network(config: TrainConfig, process: ProcessInfo) -> ProcessInfo:
    """Assign the process to a network: by its rank, or as an independent job.

    Raises: ConfigError when the number of processes or the index of the task does not fit.
    """
    process = process.with_replicas(config.runtime.replicas)
    size, number = config.population.size, config.population.network
    if config.graft.exchange != "files" or size is None:
        return process
    index = array_index()
    if number == "auto" and index is not None and index >= size:
        raise ConfigError(
            f"this is task {index} of an array, and population.size is {size}: number the tasks "
            f"from 0 to {size - 1}, or pass population.network"
        )
    return process.as_job((index or 0) if number == "auto" else number, size)


def claim_network(config: TrainConfig, process: ProcessInfo) -> tuple[int, Lease]:
    """Take the lease of this job's network, or of the first one that is free.

    A network is free if no other process holds its lease and it has not finished.

    Raises: LeaseHeldError naming the holder, or when nothing is left to train.
    """
    if config.population.network != "auto" or array_index() is not None:
        return process.network, _lease(config, process.network)
    directories = [RunDirectory(config.run_dir, job=number) for number in range(process.networks)]
    finished = [_is_finished(directory, config.epochs) for directory in directories]
    for network in range(process.networks):
        if finished[network] and not all(finished):
            continue
        with contextlib.suppress(LeaseHeldError):
            return network, _lease(config, network)
    raise LeaseHeldError(
        f"{config.run_dir}: {sum(finished)} of {process.networks} networks have finished, and "
        "other jobs train the rest: nothing is left for this job (population.network auto)"
    )


def _lease(config: TrainConfig, network: int) -> Lease:
    path = RunDirectory(config.run_dir, job=network).lease
    try:
        return Lease(path, holder={"network": network}).acquire()
    except LeaseHeldError as error:
        raise LeaseHeldError(f"network {network}: {error}") from error


def _is_finished(directory: RunDirectory, epochs: int) -> bool:
    checkpoints = complete_checkpoints(directory.checkpoints)
    return bool(checkpoints) and checkpoints[-1].epoch >= epochs


def is_job(config: TrainConfig) -> bool:
    """Whether each network is an independent job."""
    return config.graft.exchange == "files"
