"""Scores of a run's averaged weights: soup, moving averages, and means of checkpoints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from torch import Tensor

from dist_graft.analysis.calibration import calibration_error, negative_log_likelihood
from dist_graft.analysis.soups import uniform_soup
from dist_graft.analysis.stored_weights import StoredRun, open_run
from dist_graft.errors import ConfigError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.step import EvalResult
from dist_graft.training.task import accuracy
from dist_graft.training.weights import State

T = TypeVar("T")
Split = Literal["test", "val"]
Accuracies = dict[str, float | None]
"""Accuracies and other scores by name; None if not measured."""

_SCORES = ("test_accuracy", "test_loss", "test_calibration_error", "val_accuracy")


Evaluate = Callable[[State, Split], EvalResult]
"""Evaluates weights on a split, with re-estimated batch norm statistics."""


def evaluate_averages(
    stored: StoredRun,
    states: Sequence[State],
    evaluate: Evaluate,
    *,
    splits: Sequence[Split],
    soup: Accuracies,
    last_checkpoints: int,
) -> dict[str, Accuracies]:
    """Evaluate the averaged weights that a run can deliver.

    Args:
        stored: the run.
        states: weights of its networks.
        evaluate: evaluates weights.
        splits: "test", and "val" if there is a validation split.
        soup: test_accuracy, test_loss and test_calibration_error of the uniform soup, which has
            been tested already.
        last_checkpoints: number of checkpoints to average; 0: none.

    Returns: test_accuracy, val_accuracy and test_calibration_error in percent and test_loss in nats
        of the uniform soup ("soup"), of the moving averages of the weights ("ema", if the run has
        them), of the mean of the last checkpoints ("checkpoints"), and of their ensemble
        ("snapshots"). All but the soup's are means over the networks. Batch norm is re-estimated.
        None without a validation split, or if weights are not finite.

    Raises: ConfigError if the run has fewer checkpoints.
    """

    def of_model(state: State, split: Split) -> Accuracies:
        return score(evaluate(state, split))

    def of_ensemble(states: Sequence[State], split: Split) -> Accuracies:
        return score_ensemble(evaluate(state, split) for state in states)

    validated = evaluate(uniform_soup(states), "val").accuracy if "val" in splits else None
    found = {"soup": soup | {"val_accuracy": validated}}
    moving = [stored.averaged_state(network) for network in stored.networks]
    if all(moving):
        found["ema"] = _mean_scores(of_model, [state for state in moving if state], splits)
    if last_checkpoints:
        checkpoints = _last_checkpoints(stored, last_checkpoints)
        means = [uniform_soup(states) for states in checkpoints]
        found["checkpoints"] = _mean_scores(of_model, means, splits)
        found["snapshots"] = _mean_scores(of_ensemble, checkpoints, splits)
    return found


def _mean_scores(
    scores: Callable[[T, Split], Accuracies], networks: Sequence[T], splits: Sequence[Split]
) -> Accuracies:
    """Scores by split and name, means over the networks."""
    rows = [
        {
            f"{split}_{name}": value
            for split in splits
            for name, value in scores(each, split).items()
        }
        for each in networks
    ]
    return {name: mean_or_none([row.get(name) for row in rows]) for name in _SCORES}


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of the values; None if one is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def score(result: EvalResult) -> Accuracies:
    """Accuracy, loss and calibration error; the last two are None if a prediction is not finite."""
    assert result.probabilities is not None
    assert result.labels is not None
    return {
        "accuracy": result.accuracy,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "calibration_error": (
            calibration_error(result.probabilities, result.labels) if result.finite else None
        ),
    }


def score_ensemble(results: Iterable[EvalResult]) -> Accuracies:
    """Accuracy, loss and calibration error of the mean of the predicted probabilities.

    The results are used one at a time, and only the sum of their probabilities is kept, in the
    first one's. Loss and calibration error are None if a network is not finite.
    """
    total: Tensor | None = None
    finite, count = True, 0
    for result in results:
        assert result.probabilities is not None
        finite &= result.finite
        count += 1
        total = result.probabilities if total is None else total.add_(result.probabilities)
    assert total is not None
    assert result.labels is not None
    right = accuracy(total, result.labels)
    mean = total.div_(count)
    return {
        "accuracy": right,
        "loss": negative_log_likelihood(mean, result.labels) if finite else None,
        "calibration_error": calibration_error(mean, result.labels) if finite else None,
    }


def _last_checkpoints(stored: StoredRun, count: int) -> list[list[State]]:
    """Weights of each network in its last checkpoints."""
    found = [
        each
        for each in complete_checkpoints(RunDirectory(stored.path).checkpoints)
        if (each.networks, each.resumed_networks)
        == (stored.checkpoint.networks, stored.checkpoint.resumed_networks)
    ]
    if len(found) < count:
        raise ConfigError(
            f"{stored.path} has {len(found)} checkpoints of all networks, fewer than "
            f"--last_checkpoints {count}: train with --checkpoint.keep {count}"
        )
    runs = [open_run(stored.path, checkpoint.path.name) for checkpoint in found[-count:]]
    return [[run.state(network) for run in runs] for network in stored.networks]
