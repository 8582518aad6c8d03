"""Results of a population of separate jobs, at the end of the last job."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.jsonl import read_json_lines
from dist_graft.monitoring.metrics import MOMENTS
from dist_graft.population.round.file_choice import Place
from dist_graft.population.round.publications import (
    Publication,
    PublicationError,
    network_folder,
    publication_path,
)
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints, load_network, network_file
from dist_graft.training.step import EvalResult
from dist_graft.training.summary import ensemble_chunks, summarize


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
    """Row of a network for `summarize`, from the summary of its job."""
    metric = summary.get("metric", "accuracy")
    values = summary["networks"][0]
    numbers = [values["lr"], *(values[f"{metric}_{when}"] for when in MOMENTS)]
    numbers = [math.nan if number is None else float(number) for number in numbers]
    return [*numbers, float(not summary["diverged"]), float(summary["samples"])]


def population_summary(
    directory: RunDirectory,
    summaries: Sequence[Mapping[str, Any]],
    ensembles: Sequence[float] | None,
) -> dict[str, Any]:
    """Content of summary.json, from the summaries of all networks' jobs.

    Args:
        directory: of the run.
        summaries: result of `finished_summaries`.
        ensembles: accuracy of the ensemble before and after the last round, if known.
    """
    summary = summarize(
        str(summaries[0].get("metric", "accuracy")),
        [row_of(each) for each in summaries],
        ensembles=ensembles,
        seconds=max(float(each["wall_seconds"]) for each in summaries),
    )
    return summary | {"events": read_events(directory, len(summaries))}


def read_events(directory: RunDirectory, networks: int) -> list[dict[str, Any]]:
    """Events of all networks' jobs, ordered by time."""
    paths = [RunDirectory(directory.path, job=network).events for network in range(networks)]
    events = [event for path in paths for event in read_json_lines(path)]
    return sorted(events, key=lambda event: str(event.get("time")))


def states_around_round(
    directory: RunDirectory, networks: int, place: Place | None
) -> list[Iterator[dict[str, Tensor]]]:
    """States of all networks before and after the last round; final states only if there was none.

    Args:
        directory: of the run.
        networks: size of the population.
        place: where the networks published their weights for a round after the last epoch, if any.
    """
    moments = [final_states(directory, networks)]
    if place is not None:
        moments.insert(0, published_states(directory, networks, place))
    return moments


def final_states(directory: RunDirectory, networks: int) -> Iterator[dict[str, Tensor]]:
    """State dict of each network in its latest checkpoint.

    Raises: RunDirectoryError if a checkpoint is missing or damaged.
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

    Raises: RunDirectoryError if a publication is missing or damaged.
    """
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
    """Return the next state, or the reason that it cannot be read."""
    try:
        return next(states), None
    except RunDirectoryError as error:
        return {}, error


def add_probabilities(
    sums: list[tuple[Tensor, Tensor]], result: EvalResult
) -> list[tuple[Tensor, Tensor]]:
    """Add a network's probabilities to the sums over the earlier networks, in place.

    Returns: sums of probabilities, and labels, in chunks; the network's own if it is the first.
    """
    parts = list(ensemble_chunks(result))
    for (total, _), (part, _) in zip(sums, parts, strict=False):
        total.add_(part)
    return sums or parts


def no_ensemble(directory: RunDirectory, problem: RunDirectoryError | None) -> str:
    """Message that the ensemble is unknown. problem: None if another process cannot read it."""
    return (
        f"no ensemble: {problem or 'another process cannot read it'}; dist-graft evaluate "
        f"{directory.path} computes it from the checkpoints"
    )
