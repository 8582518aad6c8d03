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
from dist_graft.training.checkpoint.files import Checkpoint, complete_checkpoints
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
    moving: Sequence[State | None],
    splits: Sequence[Split],
    soup: Accuracies,
    checkpoints: Sequence[Checkpoint],
) -> dict[str, Accuracies]:
    """Evaluate the averaged weights that a run can deliver.

    Args:
        stored: the run.
        states: weights of its networks.
        evaluate: evaluates weights.
        moving: moving average of the weights of each network, if the run has them.
        splits: "test", and "val" if there is a validation split.
        soup: test_accuracy, test_loss and test_calibration_error of the uniform soup, which has
            been tested already.
        checkpoints: of all networks, to average; [] for no such average.

    Returns: test_accuracy, val_accuracy and test_calibration_error in percent and test_loss in nats
        of the uniform soup ("soup"), of the moving averages of the weights ("ema", if the run has
        them), of the mean of the last checkpoints ("checkpoints"), and of their ensemble
        ("snapshots"). All but the soup's are means over the networks. Batch norm is re-estimated.
        None without a validation split, or if weights are not finite.
    """

    def of_model(state: State, split: Split) -> Accuracies:
        return score(evaluate(state, split))

    def of_ensemble(states: Sequence[State], split: Split) -> Accuracies:
        return score_ensemble(evaluate(state, split) for state in states)

    validated = evaluate(uniform_soup(states), "val").accuracy if "val" in splits else None
    found = {"soup": soup | {"val_accuracy": validated}}
    if all(moving):
        found["ema"] = _mean_scores(of_model, [state for state in moving if state], splits)
    if checkpoints:
        runs = [open_run(stored.path, checkpoint.path.name) for checkpoint in checkpoints]
        snapshots = [[run.state(network) for run in runs] for network in stored.networks]
        means = [uniform_soup(states) for states in snapshots]
        found["checkpoints"] = _mean_scores(of_model, means, splits)
        found["snapshots"] = _mean_scores(of_ensemble, snapshots, splits)
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
    first one's. Networks that are not finite are left out, as during training; if all are, the
    accuracy is that of the last one.
    """
    total: Tensor | None = None
    count = 0
    for result in results:
        assert result.probabilities is not None
        if result.finite:
            count += 1
            total = result.probabilities if total is None else total.add_(result.probabilities)
    if total is None:
        return score(result)
    assert result.labels is not None
    right = accuracy(total, result.labels)
    mean = total.div_(count)
    return {
        "accuracy": right,
        "loss": negative_log_likelihood(mean, result.labels),
        "calibration_error": calibration_error(mean, result.labels),
    }


def last_checkpoints(stored: StoredRun, count: int) -> list[Checkpoint]:
    """The last checkpoints of all networks up to the one that the run was opened at.

    Raises: ConfigError if there are fewer, or the networks are independent jobs.
    """
    if not count:
        return []
    if stored.config.graft.exchange == "files":
        raise ConfigError(
            "--last_checkpoints needs checkpoints of all networks, and independent jobs "
            "(graft.exchange files) have their own: leave it out"
        )
    found = [
        each
        for each in complete_checkpoints(RunDirectory(stored.path).checkpoints)
        if (each.networks, each.resumed_networks)
        == (stored.checkpoint.networks, stored.checkpoint.resumed_networks)
    ]
    newest = stored.checkpoint.path.name
    names = [each.path.name for each in found]
    # A run that is still training may have deleted it.
    found = found[: names.index(newest) + 1] if newest in names else []
    if len(found) < count:
        raise ConfigError(
            f"{stored.path} has {len(found)} checkpoints of all networks up to {newest}, fewer "
            f"than --last_checkpoints {count}: train with --checkpoint.keep {count}"
        )
    return found[-count:]
