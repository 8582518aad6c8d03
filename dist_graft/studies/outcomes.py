"""What a finished run says of itself: accuracies, learning curves, invalid filters, versions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_graft.errors import RunDirectoryError

THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Accuracies are percentages of the split, after the last round."""

    learning_rates: list[float]
    """Of the networks, in order."""
    members: list[float]
    """Accuracy of each network."""
    others: dict[str, float] = field(default_factory=dict)
    """ensemble, uniform_soup, uniform_soup_as_is and greedy_soup, as far as they are known."""

    def values(self) -> dict[str, float]:
        """By the names that a plan's primary outcome may have, and the other soups."""
        return {
            "largest_lr_member": self.members[largest(self.learning_rates)],
            "mean_of_members": statistics.fmean(self.members),
            **self.others,
        }


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy in percent at the end of an epoch (0-based), before its round."""

    epoch: int
    largest_lr_member: float
    mean_of_members: float


def largest(learning_rates: Sequence[float]) -> int:
    """The network with the largest learning rate; of equals the last."""
    return max(range(len(learning_rates)), key=lambda network: (learning_rates[network], network))


def is_finished(run: Path) -> bool:
    """Whether the training came to its end; the summary is the last that it writes."""
    return (run / "summary.json").is_file()


def read_test(run: Path) -> Outcome:
    """Test accuracies; soups when the run was evaluated.

    Raises: RunDirectoryError when the run's files are not what they should be.
    """
    summary = _read_json(run / "summary.json")
    others = {"ensemble": float(summary["ensemble_accuracy_after_last_round"])}
    if (run / "evaluation.json").is_file():
        evaluation = _read_json(run / "evaluation.json")
        others["uniform_soup"] = evaluation["uniform_soup"]["batch_norm_reestimated"]
        others["uniform_soup_as_is"] = evaluation["uniform_soup"]["batch_norm_as_is"]
        if evaluation["greedy_soup"]:
            others["greedy_soup"] = evaluation["greedy_soup"]["batch_norm_reestimated"]
    networks = summary["networks"]
    return Outcome(
        learning_rates=[network["lr"] for network in networks],
        members=[network["accuracy_after_last_round"] for network in networks],
        others=others,
    )


def read_validation(run: Path, learning_rates: Sequence[float]) -> Outcome:
    """Validation accuracies; what the files say of the test set is not looked at.

    A network alone has no round, so the last line of its metrics is of its final weights. Those of
    several networks are evaluated after their last round.

    Raises: RunDirectoryError when the run's files are not what they should be.
    """
    if len(learning_rates) == 1:
        members = [_metrics(run, 0)[-1]["val_accuracy"]]
    else:
        evaluation = _read_json(run / "evaluation.json")
        members = [member["val_accuracy"] for member in evaluation["members"]]
    if None in members:
        raise RunDirectoryError(f"{run} has no validation accuracies: data.val_fraction is 0")
    return Outcome(learning_rates=list(learning_rates), members=members)


def read_curve(run: Path, learning_rates: Sequence[float], split: str) -> list[CurvePoint]:
    """Accuracy of each epoch on the split "test" or "validation"."""
    name = "test_accuracy" if split == "test" else "val_accuracy"
    columns = [
        [float(line[name]) for line in _metrics(run, network)]
        for network in range(len(learning_rates))
    ]
    primary = largest(learning_rates)
    return [
        CurvePoint(epoch, row[primary], statistics.fmean(row))
        for epoch, row in enumerate(zip(*columns, strict=True))
    ]


def read_versions(run: Path) -> dict[str, str]:
    """Versions and commit that the run was made with."""
    stored = yaml.safe_load((run / "config.yaml").read_text())["run"]
    return {**stored["versions"], "commit": stored["git_commit"] or ""}


def count_invalid(run: Path, network: int) -> dict[str, int]:
    """Filters of a network's final weights: all, and those below each threshold.

    Raises: RunDirectoryError without a checkpoint, ConfigError when it does not fit its model.
    """
    from dist_graft.analysis.stored_weights import architecture, open_run
    from dist_graft.grafting.information import invalid_filters
    from dist_graft.grafting.units import graft_units

    stored = open_run(run)
    state = stored.state(network)
    model = architecture(stored.config.model, state, run)
    units = graft_units(model, lead=stored.config.graft.lead)
    leads = [unit.filters(state[unit.lead]) for unit in units]
    return {"filters": sum(len(filters) for filters in leads)} | {
        f"invalid_{threshold:g}": sum(int(invalid_filters(lead, threshold)) for lead in leads)
        for threshold in THRESHOLDS
    }


def epochs_done(run: Path) -> int:
    """Finished epochs of a run that may still be going on."""
    metrics = run / "network00" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def _metrics(run: Path, network: int) -> list[dict[str, Any]]:
    path = run / f"network{network:02d}" / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    return content
