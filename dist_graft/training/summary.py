"""The end of a run in numbers."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dist_graft.errors import DataError
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.training.loop import EvalResult, accuracy

LARGEST_ENSEMBLE = 2**22
"""Probabilities that each network sends after every epoch; 16 MiB."""


def ensemble_accuracy(runtime: Runtime, tested: EvalResult, epoch: int) -> float | None:
    """Percent that the members' mean probability hits after an epoch: a collective.

    Returns: None where it would cost too much, or the networks were not tested on as many images.
    """
    size = float(tested.probabilities.numel())
    sizes = {row[0] for row in runtime.gather([size], f"the test images of epoch {epoch}")}
    if len(sizes) > 1 or size > LARGEST_ENSEMBLE:
        return None
    return _together(runtime, tested, f"the ensemble of epoch {epoch}")


def summarise(
    runtime: Runtime,
    lr: float,
    before: EvalResult,
    after: EvalResult,
    seconds: float,
    *,
    sound: bool,
) -> dict[str, Any]:
    """Accuracies of all networks, of their mean and of their ensemble: a collective.

    The ensemble answers with the members' mean probability. Accuracies are percentages. Networks
    that ended with weights that are not finite count in the mean, and cannot in the ensemble.

    Raises: DataError, in all processes, when the networks were not tested on as many images.
    """
    numbers = [lr, before.accuracy, after.accuracy, float(sound), float(len(before.labels))]
    rows = runtime.gather(numbers, "the summary")
    tested = [int(row[4]) for row in rows]
    if len(set(tested)) > 1:  # data.skip_broken, and machines with copies of their own
        raise DataError(
            f"the networks were tested on different numbers of images ({tested}): give all "
            "machines the same files; the same command then goes on"
        )
    summary: dict[str, Any] = {
        "networks": [
            {
                "network": network,
                "lr": row[0],
                "accuracy_before_last_round": row[1],
                "accuracy_after_last_round": row[2],
            }
            for network, row in enumerate(rows)
        ]
    }
    for column, (when, result) in enumerate(
        (("before_last_round", before), ("after_last_round", after)), start=1
    ):
        summary[f"mean_accuracy_{when}"] = statistics.fmean(row[column] for row in rows)
        summary[f"ensemble_accuracy_{when}"] = _together(runtime, result, f"the ensemble {when}")
    diverged = [network for network, row in enumerate(rows) if not row[3]]
    return summary | {"diverged": diverged, "wall_seconds": seconds}


def _together(runtime: Runtime, result: EvalResult, what: str) -> float:
    """Accuracy of the networks whose probabilities are finite, as one: a collective."""
    answers = result.probabilities
    if not answers.isfinite().all():
        answers = torch.zeros_like(answers)
    return accuracy(runtime.sum_over_networks(answers, what), result.labels)
