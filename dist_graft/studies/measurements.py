"""Measurements of a finished run, read from its files: columns of results.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_graft.analysis.run_files import read_json
from dist_graft.config import TrainConfig
from dist_graft.grafting.rules.papa import PapaConfig
from dist_graft.grafting.rules.wash import WashConfig
from dist_graft.run_directory import RunDirectory
from dist_graft.studies.controls import Run
from dist_graft.studies.train_options import Delivery, has_exchange

NEAR_HALF = 0.02
"""Coefficients this close to 1/2 make a layer a plain average of recipient and donor."""

MEASURED: Mapping[str, str] = {
    # Of the test set: mean over the members, ensemble, and uniform soup
    **dict.fromkeys(("nll", "ensemble_nll", "soup_nll"), "float64"),
    **dict.fromkeys(
        ("calibration_error", "ensemble_calibration_error", "soup_calibration_error"), "float64"
    ),
    # Of the average over the training that the arm delivers
    **dict.fromkeys(("average_nll", "average_calibration_error"), "float64"),
    "disagreement": "float64",
    "barrier": "float64",
    "barrier_before": "float64",  # before the last round
    **dict.fromkeys(
        (
            *("coefficient_min", "coefficient_5", "coefficient_median", "coefficient_95"),
            *("coefficient_max", "coefficient_near_half", "rounds_with_donor"),
        ),
        "float64",
    ),
    # Per epoch, separated by spaces; nan in an epoch without a round
    **dict.fromkeys(
        ("coefficients_5", "coefficients_median", "coefficients_95"),
        "str",
    ),
    **dict.fromkeys(("cumulative_pull", "moves_per_scalar"), "float64"),
    **dict.fromkeys(("rounds", "heals", "bytes_moved"), "Int64"),
}
"""Columns with their dtypes; empty: not measured. See docs/compare_report.md for their meaning."""


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Read the measurements of a finished run.

    Args:
        folder: run directory.
        run: its arm has the method's options and the number of networks.

    Returns: values by column of MEASURED; columns that were not measured are absent. Lists are one
    value per epoch.

    Raises: RunDirectoryError if metrics.jsonl of a network, or a file that exists, cannot be read.
    """
    directory, config = RunDirectory(folder), run.config
    metrics = [read_json(directory.metrics(network)) for network in range(run.arm.networks)]
    healed = [event for event in events_of_run(folder) if event["kind"] == "healed"]
    measured: dict[str, Any] = {"heals": len(healed)}
    if run.split == "test" and (folder / "evaluation.json").is_file():
        evaluation = read_json(folder / "evaluation.json")
        measured |= read_evaluation(evaluation, run.arm.delivers)
    if not has_exchange(config, run.arm.networks):
        return measured
    return measured | measure_rounds(config, metrics)


def events_of_run(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, or of all of its jobs."""
    paths = [RunDirectory(folder).events, *sorted(folder.glob("network*/events.jsonl"))]
    return [event for path in paths if path.is_file() for event in read_json(path)]


def read_evaluation(evaluation: Mapping[str, Any], delivers: Delivery) -> dict[str, float]:
    """Return the columns that ``dist-graft evaluate`` measures, from evaluation.json.

    A snapshot ensemble is the ensemble of a run that delivers it.
    """
    members = evaluation["members"]
    soup = evaluation["uniform_soup"]
    values = {
        "nll": _mean([member["test_loss_reestimated"] for member in members]),
        "calibration_error": _mean(
            [member["test_calibration_error_reestimated"] for member in members]
        ),
        "ensemble_nll": evaluation["ensemble_test_loss_reestimated"],
        "ensemble_calibration_error": evaluation["ensemble_test_calibration_error_reestimated"],
        "soup_nll": soup["test_loss"],
        "soup_calibration_error": soup["test_calibration_error"],
        "disagreement": evaluation["disagreement"],
        "barrier": (evaluation["barrier"] or {}).get("mean"),
        "barrier_before": (evaluation["barrier_before_last_round"] or {}).get("mean"),
    }
    if delivers in ("ema", "checkpoints", "snapshots"):
        prefix = "ensemble" if delivers == "snapshots" else "average"
        scores = evaluation["averages"][delivers]
        values[f"{prefix}_nll"] = scores["test_loss"]
        values[f"{prefix}_calibration_error"] = scores["test_calibration_error"]
    return {name: value for name, value in values.items() if value is not None}


def measure_rounds(
    config: TrainConfig, metrics: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return the columns about the rounds, from metrics.jsonl of every network.

    Coefficients are those of the last round of each epoch, over all networks and graft units.
    """
    rounds = [line["graft"] for lines in metrics for line in lines if line["graft"]]
    if not rounds:
        return {"rounds": 0, "bytes_moved": 0}
    measured: dict[str, Any] = {
        "rounds": sum(line["graft"]["rounds"] for line in metrics[0] if line["graft"]),
        "bytes_moved": sum(round_["bytes"] for round_ in rounds),
    }
    if config.method == "graft" and config.graft.source == "external":
        measured |= _coefficients(metrics)
    options = vars(config).get(config.method)
    if isinstance(options, PapaConfig) and options.variant == "pull":
        measured["cumulative_pull"] = cumulative_pull(options, metrics[0])
    if isinstance(options, WashConfig):
        # p decreases linearly from the first layer to 0 at the last one: p/2 on average
        measured["moves_per_scalar"] = measured["rounds"] * options.probability / 2
    return measured


def cumulative_pull(options: PapaConfig, lines: Sequence[Mapping[str, Any]]) -> float:
    """Sum of −ln(share kept) over the pulls of PAPA, in e-folds.

    Without training, the distance of a network to the mean would shrink by this many factors of e.
    The learning rate of a pull is taken to be that at the start of its epoch.

    Args: lines: of one network's metrics.jsonl.
    """
    largest = max(line["lr"] for line in lines)
    total = 0.0
    for line in lines:
        if line["graft"]:
            kept = 1 - (1 - options.beta) * options.rate(line["lr"] / largest)
            total += line["graft"]["rounds"] * (-math.log(kept) if kept > 0 else math.inf)
    return total


def _coefficients(metrics: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Coefficients of the rounds in which a network mixed in a donor's weights.

    A round without a donor that is ready, and one that copies a donor, has no such coefficients.
    """
    rounds = [
        [line["graft"] for line in lines if line["graft"]] for lines in zip(*metrics, strict=True)
    ]
    with_donor = [[r for r in epoch if r["donor"] is not None] for epoch in rounds]
    by_epoch = [
        [value for r in epoch if r["healed_from"] is None for value in r["coefficient"].values()]
        for epoch in with_donor
    ]
    share = {"rounds_with_donor": 100 * sum(map(len, with_donor)) / sum(map(len, rounds))}
    values = np.array([value for epoch in by_epoch for value in epoch])
    if not values.size:
        return share
    shares = {"5": 0.05, "median": 0.5, "95": 0.95}
    near_half = np.abs(values - 0.5) <= NEAR_HALF
    return share | {
        "coefficient_min": float(values.min()),
        "coefficient_max": float(values.max()),
        "coefficient_near_half": 100 * float(near_half.mean()),
        **{f"coefficient_{name}": float(np.quantile(values, q)) for name, q in shares.items()},
        **{
            f"coefficients_{name}": [
                float(np.quantile(epoch, q)) if epoch else math.nan for epoch in by_epoch
            ]
            for name, q in shares.items()
        },
    }


def _mean(values: Sequence[Any]) -> float | None:
    return None if None in values else sum(values) / len(values)


def parse_list(cell: str) -> list[float]:
    """Return the numbers of a cell of MEASURED that has one per epoch."""
    return [float(number) for number in cell.split()]
