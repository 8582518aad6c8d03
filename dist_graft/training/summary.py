"""Final results of a run: the content of summary.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_graft.errors import DataError
from dist_graft.monitoring.metrics import MOMENTS
from dist_graft.training.step import ENSEMBLE_CHUNK, EvalResult


def ensemble_chunks(result: EvalResult) -> Iterator[tuple[Tensor, Tensor]]:
    """A network's probabilities and labels for the ensemble, in chunks of up to ENSEMBLE_CHUNK.

    Zeros instead of probabilities if some of the network's are not finite.
    """
    assert result.probabilities is not None
    assert result.labels is not None
    samples = max(1, ENSEMBLE_CHUNK // result.probabilities.shape[1])
    chunks = (tensor.split(samples) for tensor in (result.probabilities, result.labels))
    for probabilities, labels in zip(*chunks, strict=True):
        yield probabilities if result.finite else torch.zeros_like(probabilities), labels


def primary_metric(result: EvalResult) -> tuple[str, float]:
    """Name and value of the first metric; the loss when there is none."""
    return next(iter(result.metrics.items()), ("loss", result.loss))


def summarize(
    metric: str,
    rows: Sequence[Sequence[float]],
    *,
    ensembles: Sequence[float] | None,
    seconds: float,
    first: int = 0,
) -> dict[str, Any]:
    """Final test results of all networks, their mean and their ensemble.

    Args:
        metric: name of the metric. Accuracies are percentages.
        rows: of each network: learning rate, metric before and after the last round, whether it is
            finite, number of test samples.
        ensembles: accuracy of the ensemble before and after the last round; None unless the task
            is classification. Non-finite networks count in the mean, but not in the ensemble.
        seconds: duration of the run.
        first: number of the first network.
    """
    summary: dict[str, Any] = {
        "networks": [
            {
                "network": network,
                "lr": row[0],
                **{f"{metric}_{when}": row[1 + i] for i, when in enumerate(MOMENTS)},
            }
            for network, row in enumerate(rows, first)
        ]
    }
    for index, when in enumerate(MOMENTS):
        summary[f"mean_{metric}_{when}"] = statistics.fmean(row[1 + index] for row in rows)
        if ensembles is not None:
            summary[f"ensemble_{metric}_{when}"] = ensembles[index]
    if metric != "accuracy":
        summary["metric"] = metric
    diverged = [network for network, row in enumerate(rows, first) if not row[3]]
    return summary | {"diverged": diverged, "wall_seconds": seconds}


def check_equal_samples(rows: Sequence[Sequence[float]]) -> None:
    """Raise DataError, on all ranks, when the networks were tested on different samples."""
    tested = [int(row[4]) for row in rows]
    if len(set(tested)) > 1:  # data.skip_broken, and different files on each machine
        raise DataError(
            f"the networks were tested on different numbers of images ({tested}): give all "
            "machines the same files, and rerun the command to resume"
        )
