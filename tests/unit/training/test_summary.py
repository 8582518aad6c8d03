from __future__ import annotations

import math

import pytest
import torch

from dist_graft.errors import DataError
from dist_graft.training.job_summary import row_of
from dist_graft.training.step import EvalResult
from dist_graft.training.summary import (
    check_equal_samples,
    ensemble_chunks,
    primary_metric,
    summarize,
)


def classified(scores: list[list[float]]) -> EvalResult:
    """The result for images that are all of class 0."""
    return EvalResult(
        loss=0.0,
        samples=len(scores),
        probabilities=torch.tensor(scores),
        labels=torch.zeros(len(scores), dtype=torch.int64),
        finite=bool(torch.tensor(scores).isfinite().all()),
    )


def test_the_content_of_a_summary() -> None:
    rows = [[0.1, 25.0, 50.0, 1.0, 4.0], [0.2, 75.0, 100.0, 0.0, 4.0]]
    assert summarize("accuracy", rows, ensembles=[80.0, 90.0], seconds=12.5) == {
        "networks": [
            {
                "network": network,
                "lr": row[0],
                "accuracy_before_last_round": row[1],
                "accuracy_after_last_round": row[2],
            }
            for network, row in enumerate(rows)
        ],
        "mean_accuracy_before_last_round": 50.0,
        "ensemble_accuracy_before_last_round": 80.0,
        "mean_accuracy_after_last_round": 75.0,
        "ensemble_accuracy_after_last_round": 90.0,
        "diverged": [1],
        "wall_seconds": 12.5,
    }


def test_a_metric_other_than_accuracy_is_named() -> None:
    rows = [[0.1, 0.5, 0.75, 1.0, 4.0]]
    assert summarize("iou", rows, ensembles=None, seconds=1.0) == {
        "networks": [
            {"network": 0, "lr": 0.1, "iou_before_last_round": 0.5, "iou_after_last_round": 0.75}
        ],
        "mean_iou_before_last_round": 0.5,
        "mean_iou_after_last_round": 0.75,
        "metric": "iou",
        "diverged": [],
        "wall_seconds": 1.0,
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({"iou": 0.5, "dice": 0.25}, ("iou", 0.5)), ({}, ("loss", 2.0))],
)
def test_the_primary_metric_is_the_first_metric(
    metrics: dict[str, float], expected: tuple[str, float]
) -> None:
    assert primary_metric(EvalResult(loss=2.0, samples=1, metrics=metrics)) == expected


def test_a_diverged_network_does_not_count_in_the_ensemble() -> None:
    scores = [[0.9, 0.1], [0.2, 0.8]]
    ((found, labels),) = ensemble_chunks(classified(scores))
    assert torch.equal(found, torch.tensor(scores))
    assert labels.tolist() == [0, 0]
    ((found, _),) = ensemble_chunks(classified([[0.9, 0.1], [math.nan] * 2]))
    assert torch.equal(found, torch.zeros(2, 2))


@pytest.mark.parametrize(("numbers", "sizes"), [(1, [1] * 5), (7, [2, 2, 1]), (99, [5])])
def test_an_ensemble_is_summed_in_chunks(
    numbers: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_graft.training.summary.ENSEMBLE_CHUNK", numbers)
    result = classified([[0.1 * row, 1.0, 0.0] for row in range(5)])
    parts, labels = zip(*ensemble_chunks(result), strict=True)
    assert [len(part) for part in parts] == [len(part) for part in labels] == sizes
    assert result.probabilities is not None
    assert torch.equal(torch.cat(parts), result.probabilities)


def test_a_result_of_a_job_that_is_not_finite() -> None:
    """JSON has no NaN: null stands for it."""
    values = {"network": 3, "lr": 0.1, "loss_before_last_round": None, "loss_after_last_round": 2.0}
    row = row_of({"metric": "loss", "networks": [values], "diverged": [3], "samples": 40})
    assert row == pytest.approx([0.1, math.nan, 2.0, 0.0, 40.0], nan_ok=True)


def test_networks_tested_on_different_samples_are_an_error() -> None:
    check_equal_samples([[0.0] * 4 + [5.0]] * 2)
    with pytest.raises(DataError, match=r"different numbers of images \(\[5, 4\]\)"):
        check_equal_samples([[0.0] * 4 + [5.0], [0.0] * 4 + [4.0]])
