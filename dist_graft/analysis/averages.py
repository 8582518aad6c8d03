"""Accuracies of a run's averaged weights: soup, moving averages, and means of checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, Protocol

from dist_graft.analysis.soups import uniform_soup
from dist_graft.analysis.stored_weights import StoredRun, open_run
from dist_graft.errors import ConfigError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.step import EvalResult
from dist_graft.training.weights import State

Split = Literal["test", "val"]


class Evaluator(Protocol):
    """Evaluates weights on a split, with stored or re-estimated batch norm statistics."""

    def evaluate(self, state: State, split: Split, *, reestimated: bool = False) -> EvalResult:
        """Return accuracy and loss."""
        ...


def evaluate_averages(
    stored: StoredRun,
    states: Sequence[State],
    evaluator: Evaluator,
    *,
    splits: Sequence[Split],
    soup_test_accuracy: float,
    last_checkpoints: int,
) -> dict[str, dict[str, float | None]]:
    """Evaluate the averaged weights that a run can deliver.

    Args:
        stored: the run.
        states: weights of its networks.
        evaluator: of weights.
        splits: "test", and "val" if there is a validation split.
        soup_test_accuracy: of the uniform soup, which has been tested already.
        last_checkpoints: number of checkpoints to average; 0: none.

    Returns: test_accuracy and val_accuracy in percent (None without a validation split) of the
        uniform soup ("soup"), of the moving averages of the weights ("ema", if the run has them),
        and of the mean of the last checkpoints ("checkpoints"). The last two are means over the
        networks. Batch norm is re-estimated, except in moving averages, which contain averages of
        its statistics.

    Raises: ConfigError if the run has fewer checkpoints.
    """
    averages: dict[str, list[State]] = {"soup": [uniform_soup(states)]}
    known = {("soup", "test"): soup_test_accuracy}
    moving = [stored.averaged_state(network) for network in stored.networks]
    if all(moving):
        averages["ema"] = [state for state in moving if state]
    if last_checkpoints:
        averages["checkpoints"] = _means_of_checkpoints(stored, last_checkpoints)

    def accuracy(kind: str, split: Split) -> float | None:
        if split not in splits or (kind, split) in known:
            return known.get((kind, split))
        return statistics.fmean(
            evaluator.evaluate(state, split, reestimated=kind != "ema").accuracy
            for state in averages[kind]
        )

    return {
        kind: {"test_accuracy": accuracy(kind, "test"), "val_accuracy": accuracy(kind, "val")}
        for kind in averages
    }


def _means_of_checkpoints(stored: StoredRun, count: int) -> list[State]:
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
    return [uniform_soup([run.state(network) for run in runs]) for network in stored.networks]
