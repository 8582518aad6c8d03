from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reading import scalars

from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.monitoring.tensorboard import LayerView, NetworkBoard, PopulationBoard

LAYERS = LayerView(
    criterion="entropy",
    information={"conv1": 1.5, "conv2": 2.0},
    invalid={0.1: {"conv1": 3, "conv2": 4}, 0.01: {"conv1": 1, "conv2": 0}},
)
GRAFT = {
    "round": 0,
    "donor": 1,
    "seconds": 0.25,
    "bytes": 3_000_000,
    "coefficient": {"conv1": 0.5, "conv2": 0.625},
    "distance": {"conv1": 4.0, "conv2": 8.0},
}
ALWAYS = {
    "loss/train": 2.5,
    "loss/test": 2.25,
    "accuracy/train": 12.5,
    "accuracy/test": 25.0,
    "learning_rate": 0.5,
    "images_per_second": 100.0,
    "entropy/conv1": 1.5,
    "entropy/conv2": 2.0,
    "invalid_0.1/conv1": 3.0,
    "invalid_0.1/conv2": 4.0,
    "invalid_0.01/conv1": 1.0,
    "invalid_0.01/conv2": 0.0,
    "invalid_filters_0.1": 7.0,
    "invalid_filters_0.01": 1.0,
}
WITH_A_ROUND = {
    "round/seconds": 0.25,
    "round/megabytes_received": 3.0,
    "coefficient/conv1": 0.5,
    "coefficient/conv2": 0.625,
    "distance/conv1": 4.0,
    "distance/conv2": 8.0,
}
WITH_VALIDATION = {"loss/val": 2.0, "accuracy/val": 50.0}


def of_epoch(epoch: int, **values: Any) -> EpochMetrics:
    fields: dict[str, Any] = {
        "lr": 0.5,
        "train_loss": 2.5,
        "train_accuracy": 12.5,
        "test_loss": 2.25,
        "test_accuracy": 25.0,
        "val_loss": None,
        "val_accuracy": None,
        "images_per_second": 100.0,
        "graft": None,
    }
    return EpochMetrics(epoch=epoch, **{**fields, **values})


def write(
    folder: Path, epochs: range, *, start_epoch: int = 0, test_accuracy: float = 25.0
) -> None:
    board = NetworkBoard(folder, start_epoch=start_epoch)
    for epoch in epochs:
        board.epoch(of_epoch(epoch, test_accuracy=test_accuracy), LAYERS)
    board.close()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ALWAYS),
        ({"graft": GRAFT}, ALWAYS | WITH_A_ROUND),
        ({"val_loss": 2.0, "val_accuracy": 50.0}, ALWAYS | WITH_VALIDATION),
    ],
)
def test_the_tags_and_values_of_an_epoch(
    tmp_path: Path, values: dict[str, Any], expected: dict[str, float]
) -> None:
    board = NetworkBoard(tmp_path, start_epoch=0)
    board.epoch(of_epoch(4, **values), LAYERS)
    board.close()
    assert scalars(tmp_path) == {tag: {4: value} for tag, value in expected.items()}


def test_what_is_written_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    board = NetworkBoard(tmp_path, start_epoch=0)
    board.epoch(of_epoch(0), LAYERS)
    assert scalars(tmp_path)["accuracy/test"] == {0: 25.0}
    board.close()


@pytest.mark.parametrize("start", [2, 1, 0])
def test_after_a_resume_no_epoch_is_there_twice(tmp_path: Path, start: int) -> None:
    """Also when no checkpoint was complete yet, so that the run starts from nothing."""
    write(tmp_path, range(3))
    write(tmp_path, range(start, 4), start_epoch=start, test_accuracy=50.0)
    found = scalars(tmp_path)["accuracy/test"]
    assert found == {epoch: 25.0 if epoch < start else 50.0 for epoch in range(4)}


def test_the_population(tmp_path: Path) -> None:
    board = PopulationBoard(tmp_path, start_epoch=0)
    board.epoch(0, [10.0, 20.0, 60.0])
    board.ensemble("before_last_round", 70.0, 0)
    board.close()
    found = {tag.rpartition("/")[2]: values[0] for tag, values in scalars(tmp_path).items()}
    assert found == {
        "test_accuracy_mean": 30.0,
        "test_accuracy_min": 10.0,
        "test_accuracy_max": 60.0,
        "test_accuracy_standard_deviation": pytest.approx(26.4575, abs=1e-3),
        "ensemble_test_accuracy_before_last_round": 70.0,
    }


def test_the_spread_of_one_network_is_none(tmp_path: Path) -> None:
    board = PopulationBoard(tmp_path, start_epoch=0)
    board.epoch(0, [10.0])
    board.close()
    assert scalars(tmp_path)["population/test_accuracy_standard_deviation"] == {0: 0.0}
