from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_graft.errors import RunDirectoryError
from dist_graft.studies.outcomes import (
    epochs_done,
    largest,
    read_curve,
    read_test,
    read_validation,
)

RATES = [0.05, 0.1]


def write_metrics(run: Path, network: int, lines: list[dict[str, Any]]) -> None:
    folder = run / f"network{network:02d}"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


SUMMARY = {
    "networks": [
        {"network": k, "lr": lr, "accuracy_before_last_round": 1.0, "accuracy_after_last_round": a}
        for k, (lr, a) in enumerate(zip(RATES, [80.0, 84.0], strict=True))
    ],
    "ensemble_accuracy_after_last_round": 86.0,
}
EVALUATION = {
    "members": [{"val_accuracy": 70.0}, {"val_accuracy": 75.0}],
    "uniform_soup": {"batch_norm_as_is": 60.0, "batch_norm_reestimated": 82.0},
    "greedy_soup": {"members": [1], "batch_norm_as_is": 83.0, "batch_norm_reestimated": 83.5},
}


def test_a_summary_alone(tmp_path: Path) -> None:
    write(tmp_path / "summary.json", SUMMARY)
    outcome = read_test(tmp_path)
    assert outcome.values() == {
        "largest_lr_member": 84.0,
        "mean_of_members": 82.0,
        "ensemble": 86.0,
    }
    assert outcome.learning_rates == RATES


def test_an_evaluation_adds_the_soups(tmp_path: Path) -> None:
    write(tmp_path / "summary.json", SUMMARY)
    write(tmp_path / "evaluation.json", EVALUATION)
    values = read_test(tmp_path).values()
    assert values["uniform_soup"] == 82.0
    assert values["uniform_soup_as_is"] == 60.0
    assert values["greedy_soup"] == 83.5


@pytest.mark.parametrize(
    ("rates", "network"),
    [([0.05, 0.1], 1), ([0.1, 0.05], 0), ([0.1, 0.1], 1), ([0.1], 0), ([0.1, 0.2, 0.2, 0.1], 2)],
)
def test_the_primary_member_has_the_largest_rate_and_of_equals_is_the_last(
    rates: list[float], network: int
) -> None:
    assert largest(rates) == network


def test_validation_needs_no_test_accuracy_to_be_there(tmp_path: Path) -> None:
    """Files from which everything about the test set was removed are enough."""
    write(tmp_path / "evaluation.json", {"members": EVALUATION["members"]})
    outcome = read_validation(tmp_path, RATES)
    assert outcome.values() == {"largest_lr_member": 75.0, "mean_of_members": 72.5}


def test_validation_of_a_network_alone_is_that_of_its_last_epoch(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"val_accuracy": 50.0}, {"val_accuracy": 61.0}])
    assert read_validation(tmp_path, [0.1]).values()["largest_lr_member"] == 61.0
    assert [p.largest_lr_member for p in read_curve(tmp_path, [0.1], "validation")] == [50.0, 61.0]


def test_a_run_without_validation_split_is_refused(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"val_accuracy": None}])
    with pytest.raises(RunDirectoryError, match="has no validation accuracies"):
        read_validation(tmp_path, [0.1])


def test_curves_are_of_the_primary_member_and_of_the_mean(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"test_accuracy": 10.0}, {"test_accuracy": 20.0}])
    write_metrics(tmp_path, 1, [{"test_accuracy": 30.0}, {"test_accuracy": 50.0}])
    points = read_curve(tmp_path, RATES, "test")
    assert [(p.epoch, p.largest_lr_member, p.mean_of_members) for p in points] == [
        (0, 30.0, 20.0),
        (1, 50.0, 35.0),
    ]
    assert epochs_done(tmp_path) == 2


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    assert epochs_done(tmp_path) == 0
    with pytest.raises(RunDirectoryError, match=r"summary\.json cannot be read"):
        read_test(tmp_path)
