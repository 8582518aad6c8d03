from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import layout, pictures, scalars, session, texts
from tensorboard.summary.writer import event_file_writer

from dist_graft.grafting.mixing import mixing_with_donor
from dist_graft.monitoring.chart_layout import PHASES, custom_scalars
from dist_graft.monitoring.layer_history import LayerHistory, informations
from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.monitoring.tensorboard import RESULTS, LayerView, NetworkBoard, PopulationBoard

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
    "distance": {"conv1": 3.0, "conv2": 4.0},
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
    "layers/entropy_mean": 1.75,
    "layers/entropy_min": 1.5,
    "layers/entropy_max": 2.0,
    "time_share/step": 75.0,
    "time_share/other": 25.0,
}
WITH_A_ROUND = {
    "round/seconds": 0.25,
    "round/megabytes_received": 3.0,
    "coefficient/conv1": 0.5,
    "coefficient/conv2": 0.625,
    "distance/conv1": 3.0,
    "distance/conv2": 4.0,
    "layers/distance_to_donor": 5.0,
    "layers/coefficient_mean": 0.5625,
    "layers/coefficient_min": 0.5,
    "layers/coefficient_max": 0.625,
}
OPTIONS: dict[str, float | str] = {"network": 1, "lr": 0.25, "method": "graft", "every": 1}
WITH_VALIDATION = {"loss/val": 2.0, "accuracy/val": 50.0}


@pytest.fixture(autouse=True)
def _in_the_order_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers sort files by name, which ends in a count: within one second, 10 is before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


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
        "phase_seconds": {"step": 3.0, "other": 1.0},
        "information": LAYERS.information,
        "graft": None,
    }
    return EpochMetrics(epoch=epoch, **{**fields, **values})


def write(
    folder: Path, epochs: range, *, start_epoch: int = 0, test_accuracy: float = 25.0
) -> None:
    board = NetworkBoard(folder, start_epoch=start_epoch, options=OPTIONS)
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
    board = NetworkBoard(tmp_path, start_epoch=0, options=OPTIONS)
    board.epoch(of_epoch(4, **values), LAYERS)
    board.close()
    assert scalars(tmp_path) == {tag: {4: value} for tag, value in expected.items()}


def test_what_is_written_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    board = NetworkBoard(tmp_path, start_epoch=0, options=OPTIONS)
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


@pytest.mark.parametrize("start", [4, 2, 0])
def test_after_a_resume_no_picture_is_there_twice(tmp_path: Path, start: int) -> None:
    lines = [{"epoch": epoch, "information": {"conv1": float(epoch)}} for epoch in range(6)]
    for first, last in ((0, 4), (start, 6)):
        board = NetworkBoard(tmp_path, start_epoch=first, options=OPTIONS)
        history = LayerHistory(lines[:first], informations)
        for epoch in range(first, last):
            history.add(lines[epoch])
            if epoch % 2:
                board.heat_map("entropy", "entropy", history)
        board.close()
    assert list(pictures(tmp_path)["heat_map/entropy"]) == [1, 3, 5]


def test_without_numbers_there_is_no_heat_map(tmp_path: Path) -> None:
    board = NetworkBoard(tmp_path, start_epoch=0, options=OPTIONS)
    board.heat_map("coefficient", "coefficient", LayerHistory([], informations))
    board.close()
    assert pictures(tmp_path) == {}


@pytest.mark.parametrize("ended", [False, True])
def test_the_row_of_the_hyperparameters(tmp_path: Path, ended: bool) -> None:
    """In the network's own directory, where the results are."""
    board = NetworkBoard(tmp_path, start_epoch=0, options=OPTIONS)
    if ended:
        board.end(60.0, 62.0, 7)
    board.close()
    assert session(tmp_path) == (OPTIONS, ended)
    assert [path.parent for path in tmp_path.rglob("events*")] == [tmp_path]
    if ended:
        found = scalars(tmp_path)
        assert found == {
            "final/test_accuracy_before_last_round": {7: 60.0},
            "final/test_accuracy_after_last_round": {7: 62.0},
        }
        assert set(found) < set(RESULTS)


def population(folder: Path, *, start_epoch: int = 0) -> PopulationBoard:
    return PopulationBoard(
        folder,
        start_epoch=start_epoch,
        layout=custom_scalars("entropy", validation=False, rounds=True),
        texts={"versions": f"| torch | {start_epoch} |"},
    )


def test_the_population(tmp_path: Path) -> None:
    board = population(tmp_path)
    board.epoch(0, [10.0, 20.0, 60.0], 65.0)
    board.ensemble("before_last_round", 70.0, 0)
    board.close()
    found = {tag.rpartition("/")[2]: values[0] for tag, values in scalars(tmp_path).items()}
    assert found == {
        "test_accuracy_mean": 30.0,
        "test_accuracy_min": 10.0,
        "test_accuracy_max": 60.0,
        "test_accuracy_standard_deviation": pytest.approx(26.4575, abs=1e-3),
        "ensemble_test_accuracy": 65.0,
        "ensemble_test_accuracy_before_last_round": 70.0,
    }


def test_the_spread_of_one_network_is_none(tmp_path: Path) -> None:
    board = population(tmp_path)
    board.epoch(0, [10.0], None)
    board.close()
    found = scalars(tmp_path)
    assert found["population/test_accuracy_standard_deviation"] == {0: 0.0}
    assert "population/ensemble_test_accuracy" not in found


def test_the_texts(tmp_path: Path) -> None:
    """Those of each start of the run, and the whole story every time."""
    events = [
        {"time": "12:00", "epoch": 1, "kind": "healed", "text": "network 1 took the weights"},
        {"time": "13:00", "epoch": 2, "kind": "slow", "text": "network 0 is slow"},
    ]
    for start in (0, 2):
        board = population(tmp_path, start_epoch=start)
        board.story(events[: start + 1], start + 1)
        board.close()
    found = texts(tmp_path)
    assert found["versions"] == {0: "| torch | 0 |", 2: "| torch | 2 |"}
    assert list(found["run/story"]) == [1, 3]
    for event in events:
        row = f"| {event['time']} | {event['epoch']} | {event['kind']} | {event['text']} |"
        assert row in found["run/story"][3].splitlines()
    assert "network 0" not in found["run/story"][1]


def test_a_round(tmp_path: Path) -> None:
    board = population(tmp_path)
    mixing = mixing_with_donor([2, 0, 1], torch.full((3, 2), 0.5, dtype=torch.float64))
    board.round(4, ["conv1", "conv2"], mixing, 5)
    board.close()
    (drawn,) = pictures(tmp_path)["round/who_gave_what_to_whom"].items()
    assert drawn[0] == 5


def test_the_charts_of_the_layout_find_their_tags(tmp_path: Path) -> None:
    """Each pattern fits exactly one tag that a run writes, and no chart is empty."""
    board = NetworkBoard(tmp_path / "network00", start_epoch=0, options=OPTIONS)
    graft = GRAFT | {"distance": {"conv1": 1.0}}
    times = dict.fromkeys(PHASES, 1.0)
    metrics = of_epoch(0, graft=graft, val_loss=1.0, val_accuracy=1.0, phase_seconds=times)
    board.epoch(metrics, LAYERS)
    board.close()
    folder = tmp_path / "population"
    whole = PopulationBoard(
        folder,
        start_epoch=0,
        layout=custom_scalars("entropy", validation=True, rounds=True),
        texts={},
    )
    whole.epoch(0, [10.0, 20.0], 30.0)
    whole.close()
    tags = {**scalars(tmp_path / "network00"), **scalars(folder)}
    patterns = [
        pattern
        for charts in layout(folder).values()
        for chart in charts.values()
        for pattern in chart
    ]
    assert len(patterns) > 25
    for pattern in patterns:
        assert sum(bool(re.match(pattern, tag)) for tag in tags) == 1 or pattern in tags, pattern


def test_a_network_alone_has_no_charts_of_rounds() -> None:
    charts = custom_scalars("l1", validation=False, rounds=False)
    assert not any("coefficient" in category or "distance" in category for category in charts)
    assert "information of the layers (l1)" in charts
