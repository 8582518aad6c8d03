"""Jobs that train one network of a population each (graft.exchange files)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, LeaseHeldError, RunDirectoryError
from dist_graft.monitoring.jsonl import read_json_lines
from dist_graft.monitoring.metrics import MOMENTS
from dist_graft.population.runtime.lease import Lease
from dist_graft.population.runtime.process_info import ProcessInfo, array_index
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints, load_network, network_file

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.population.round.file_choice import Place


def assign_network(config: TrainConfig, process: ProcessInfo) -> ProcessInfo:
    """Assign the process to a network: by its rank, or as a job of its own.

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
    lease = Lease(path, holder={"network": network})
    try:
        lease.acquire()
    except LeaseHeldError as error:
        raise LeaseHeldError(f"network {network}: {error}") from error
    return lease


def _is_finished(directory: RunDirectory, epochs: int) -> bool:
    checkpoints = complete_checkpoints(directory.checkpoints)
    return bool(checkpoints) and checkpoints[-1].epoch >= epochs


def is_job(config: TrainConfig) -> bool:
    """Whether each network is a job of its own."""
    return config.graft.exchange == "files"


def finished_summaries(
    directory: RunDirectory, networks: int, epochs: int
) -> list[dict[str, Any]] | None:
    """Summaries of all networks' jobs, in order; None while some have not finished all epochs."""
    found = []
    for network in range(networks):
        try:
            content = json.loads(RunDirectory(directory.path, job=network).summary_job.read_text())
            row_of(content)
            complete = content["epochs"] == epochs
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        if not complete:
            return None
        found.append(content)
    return found


def row_of(summary: Mapping[str, Any]) -> list[float]:
    """The row of a network for `summarize`, from the summary of its job."""
    metric = summary.get("metric", "accuracy")
    values = summary["networks"][0]
    numbers = [values["lr"], *(values[f"{metric}_{when}"] for when in MOMENTS)]
    return [*map(float, numbers), float(not summary["diverged"]), float(summary["samples"])]


def read_events(directory: RunDirectory, networks: int) -> list[dict[str, Any]]:
    """Events of all networks' jobs, in the order of their time."""
    paths = [RunDirectory(directory.path, job=network).events for network in range(networks)]
    events = [event for path in paths for event in read_json_lines(path)]
    return sorted(events, key=lambda event: str(event.get("time")))


def final_states(directory: RunDirectory, networks: int) -> Iterator[dict[str, Tensor]]:
    """State dict of each network in its latest checkpoint.

    Raises: RunDirectoryError when a network has none, or it is damaged.
    """
    for network in range(networks):
        folder = RunDirectory(directory.path, job=network).checkpoints
        checkpoints = complete_checkpoints(folder)
        if not checkpoints:
            raise RunDirectoryError(f"{folder} holds no complete checkpoint")
        newest, name = checkpoints[-1], network_file(network)
        yield load_network(newest.path / name, newest.sha256[name])["model"]


def published_states(
    directory: RunDirectory, networks: int, place: Place
) -> Iterator[dict[str, Tensor]]:
    """Floating-point tensors that each network published at a place.

    Raises: RunDirectoryError when a publication is missing or damaged.
    """
    from dist_graft.population.round.publications import (
        Publication,
        PublicationError,
        network_folder,
        publication_path,
    )

    for network in range(networks):
        path = publication_path(network_folder(directory.path / "exchange", network), place)
        try:
            with Publication(path) as publication:
                yield {key: publication.read(key) for key in publication.keys}
        except PublicationError as error:
            raise RunDirectoryError(f"{path} cannot be used: {error}") from error


def next_or_error(
    states: Iterator[dict[str, Tensor]],
) -> tuple[dict[str, Tensor], RunDirectoryError | None]:
    """The next state, or why it cannot be read."""
    try:
        return next(states), None
    except RunDirectoryError as error:
        return {}, error
