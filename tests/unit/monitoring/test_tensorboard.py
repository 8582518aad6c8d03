from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trainer import (
    LAYERS,
    FakeTrainer,
    epoch_metrics,
    epoch_report,
    graft_record,
    network_row,
)
from reading import layout, pictures, scalars, session, texts
from tensorboard.summary.writer import event_file_writer

from dist_graft.config import GraftConfig, TrainConfig
from dist_graft.config.members import differing_options, member_config
from dist_graft.monitoring.chart_layout import PHASES, custom_scalars
from dist_graft.monitoring.event_file import EventFile
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.metrics import EpochReport
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.monitoring.scalars import network_scalars, population_scalars
from dist_graft.monitoring.tensorboard import HPARAMS_FIRST, TensorBoard, hparams
from dist_graft.population.runtime.process_info import ProcessInfo

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
    "layers/coefficient_minus_half_mean": 0.0625,
    "layers/coefficient_minus_half_min": 0.0,
    "layers/coefficient_minus_half_max": 0.125,
}
OPTIONS: dict[str, float | str] = {"network": 1, "lr": 0.25, "method": "graft", "every": 1}
WITH_VALIDATION = {"loss/val": 2.0, "accuracy/val": 50.0}
WITH_AVERAGE = {"loss/ema_test": 2.0, "accuracy/ema_test": 50.0}
OTHER_SPLIT = {"loss": 2.0, "accuracy": 50.0}


FINALS = {"before_last_round": 60.0, "after_last_round": 62.0}


@pytest.fixture(autouse=True)
def _in_the_order_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers sort files by name, which ends in a counter: within one second, 10 precedes 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def write(
    folder: Path, epochs: range, *, start_epoch: int = 0, test_accuracy: float = 25.0
) -> None:
    file = EventFile(folder, start_epoch)
    for epoch in epochs:
        metrics = epoch_metrics(epoch, test={"loss": 1.0, "accuracy": test_accuracy})
        file.scalars(network_scalars(metrics, LAYERS), epoch)
    file.close()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ALWAYS),
        ({"graft": GRAFT}, ALWAYS | WITH_A_ROUND),
        ({"val": OTHER_SPLIT}, ALWAYS | WITH_VALIDATION),
        ({"ema_test": OTHER_SPLIT}, ALWAYS | WITH_AVERAGE),
    ],
)
def test_the_tags_and_values_of_an_epoch(
    tmp_path: Path, values: dict[str, Any], expected: dict[str, float]
) -> None:
    fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=9))
    callback = opened(fake)
    callback.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(4, **values)))
    callback.teardown(fake.trainer)
    found = scalars(tmp_path / "network00")
    assert found == {tag: {4: value} for tag, value in expected.items()}


def test_events_can_be_read_during_the_run(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 0)
    file.scalars({"accuracy/test": 25.0}, 0)
    file.texts({"run/events": "| time |"}, 0)
    assert scalars(tmp_path)["accuracy/test"] == {0: 25.0}
    assert texts(tmp_path)["run/events"] == {0: "| time |"}
    file.close()


@pytest.mark.parametrize("start", [2, 1, 0])
def test_a_resumed_run_has_no_epoch_twice(tmp_path: Path, start: int) -> None:
    """Also when no checkpoint was complete, so that the run starts again."""
    write(tmp_path, range(3))
    write(tmp_path, range(start, 4), start_epoch=start, test_accuracy=50.0)
    found = scalars(tmp_path)["accuracy/test"]
    assert found == {epoch: 25.0 if epoch < start else 50.0 for epoch in range(4)}


@pytest.mark.parametrize("start", [4, 2, 0])
def test_a_resumed_run_has_no_picture_twice(tmp_path: Path, start: int) -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    for first, last in ((0, 4), (start, 6)):
        file = EventFile(tmp_path, first)
        for epoch in range(first, last):
            if epoch % 2:
                file.image("heat_map/entropy", pixels, epoch)
        file.close()
    assert list(pictures(tmp_path)["heat_map/entropy"]) == [1, 3, 5]


@pytest.mark.parametrize("ended", [False, True])
def test_the_row_in_the_hparams_tab(tmp_path: Path, ended: bool) -> None:
    """In the network's own directory, where the results are."""
    file = EventFile(tmp_path, 0)
    file.begin_session(OPTIONS, first=HPARAMS_FIRST, results=["accuracy/test"])
    if ended:
        file.end_session()
    file.close()
    assert session(tmp_path) == (OPTIONS, ended)
    assert [path.parent for path in tmp_path.rglob("events*")] == [tmp_path]


def report_of(*accuracies: float, ensemble: float | None = None) -> EpochReport:
    rows = [network_row(test_metric=accuracy) for accuracy in accuracies]
    return epoch_report(epoch_metrics(0), networks=rows, ensemble=ensemble)


def opened(fake: FakeTrainer, events: RunEvents | None = None) -> TensorBoard:
    callback = TensorBoard(events or RunEvents())
    callback.on_fit_start(fake.trainer)
    return callback


def test_the_population() -> None:
    found = population_scalars(report_of(10.0, 20.0, 60.0, ensemble=65.0))
    assert {tag.rpartition("/")[2]: value for tag, value in found.items()} == {
        "test_accuracy_mean": 30.0,
        "test_accuracy_min": 10.0,
        "test_accuracy_max": 60.0,
        "test_accuracy_standard_deviation": pytest.approx(26.4575, abs=1e-3),
        "ensemble_test_accuracy": 65.0,
    }


def test_the_spread_of_one_network_is_zero() -> None:
    found = population_scalars(report_of(10.0))
    assert found["population/test_accuracy_standard_deviation"] == 0.0
    assert "population/ensemble_test_accuracy" not in found


def test_the_charts_of_the_layout_find_their_tags(tmp_path: Path) -> None:
    """No chart is empty."""
    graft = GRAFT | {"distance": {"conv1": 1.0}}
    times = dict.fromkeys(PHASES, 1.0)
    metrics = epoch_metrics(0, graft=graft, val=OTHER_SPLIT, phase_seconds=times)
    tags = {
        **network_scalars(metrics, LAYERS),
        **population_scalars(report_of(10.0, 20.0, ensemble=30.0)),
    }
    file = EventFile(tmp_path, 0)
    file.layout(custom_scalars("entropy", validation=True, rounds=True))
    file.close()
    shown = {
        tag for charts in layout(tmp_path).values() for chart in charts.values() for tag in chart
    }
    assert len(shown) > 20
    assert shown <= set(tags)


def test_without_rounds_there_are_no_charts_of_them() -> None:
    charts = custom_scalars("l1", validation=False, rounds=False)
    assert not any("coefficient" in category or "distance" in category for category in charts)
    assert "information of the layers (l1)" in charts


def test_the_charts_of_another_metric() -> None:
    charts = custom_scalars("l1", validation=True, rounds=False, metric="iou")
    assert "accuracy, %" not in charts
    tags = [str(tag) for title in charts["iou, all networks"].values() for tag in title[1]]
    assert {"iou/test", "iou/train", "iou/val"} <= set(tags)
    assert not any("ensemble" in tag for tag in tags)


class TestCallback:
    @pytest.mark.parametrize("grafter", [None, object()])
    def test_only_networks_with_rounds_have_charts_of_them(
        self, tmp_path: Path, grafter: object
    ) -> None:
        fake = FakeTrainer(tmp_path, grafter=grafter)
        opened(fake).teardown(fake.trainer)
        categories = " ".join(layout(tmp_path / "population"))
        found = ("coefficient" in categories, "distance" in categories)
        assert found == (grafter is not None,) * 2

    def test_only_rank_0_writes_for_the_population(self, tmp_path: Path) -> None:
        for rank in range(2):
            fake = FakeTrainer(tmp_path / str(rank), process=ProcessInfo(rank, 2, rank, 2))
            opened(fake).teardown(fake.trainer)
        hosts = texts(tmp_path / "0/population")["run/hosts"][0]
        assert hosts.endswith("| 0 | host0 |\n| 1 | host1 |")
        assert list((tmp_path / "0/network00").glob("events*"))
        assert list((tmp_path / "1/network01").glob("events*"))
        assert not list((tmp_path / "1/population").iterdir())

    def test_a_run(self, tmp_path: Path) -> None:
        """Epochs with rounds, pictures in the last one, and the final results."""
        fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=2), process=ProcessInfo(0, 2, 0, 2))
        callback = opened(fake)
        rows = [network_row(test_metric=value) for value in (10.0, 30.0)]
        for fake.epoch in range(2):
            callback.on_round_end(fake.trainer, graft_record(fake.epoch))
            metrics = epoch_metrics(fake.epoch, graft=GRAFT)
            callback.on_epoch_end(fake.trainer, epoch_report(metrics, networks=rows, ensemble=40.0))
        finals = {f"accuracy_{when}": value for when, value in FINALS.items()}
        fake.summary = {
            "networks": [finals | {"network": k} for k in range(2)],
            **{f"ensemble_{name}": value for name, value in finals.items()},
        }
        callback.on_fit_end(fake.trainer)
        callback.teardown(fake.trainer)
        found = scalars(tmp_path / "network00")
        assert found["accuracy/test"] == {0: 25.0, 1: 25.0}
        assert found["coefficient/conv1"] == {0: 0.5, 1: 0.5}
        assert found["final/test_accuracy_after_last_round"] == {1: 62.0}
        shared = scalars(tmp_path / "population")
        assert shared["population/test_accuracy_mean"] == {0: 20.0, 1: 20.0}
        assert shared["population/ensemble_test_accuracy"] == {0: 40.0, 1: 40.0}
        assert shared["final/ensemble_test_accuracy_before_last_round"] == {1: 60.0}
        drawn = pictures(tmp_path / "network00")
        assert 1 in drawn["heat_map/coefficient"]
        assert 1 in drawn["heat_map/entropy"]
        assert 1 in pictures(tmp_path / "population")["round/who_gave_what_to_whom"]
        options, ended = session(tmp_path / "network00")
        assert ended
        assert (options["networks"], options["method"]) == (2, "graft")

    def test_heat_maps_of_a_resumed_run_begin_with_its_first_epoch(self, tmp_path: Path) -> None:
        fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=3))
        lines = MetricsJsonl()
        lines.on_fit_start(fake.trainer)
        for epoch in range(3):
            lines.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(epoch)))
        fake.epoch = 2
        callback = opened(fake)
        assert callback._informations.epochs == [0, 1]
        callback.teardown(fake.trainer)

    def test_without_numbers_there_is_no_heat_map(self, tmp_path: Path) -> None:
        fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=1))
        callback = opened(fake)
        callback.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(0)))
        callback.teardown(fake.trainer)
        assert list(pictures(tmp_path / "network00")) == ["heat_map/entropy"]

    def test_each_start_has_its_own_texts(self, tmp_path: Path) -> None:
        for start in (0, 2):
            fake = FakeTrainer(tmp_path)
            fake.epoch = start
            opened(fake).teardown(fake.trainer)
        found = texts(tmp_path / "population")
        for tag in ("run/configuration", "run/versions", "run/hosts"):
            assert list(found[tag]) == [0, 2]

    def test_events_are_shown_immediately(self, tmp_path: Path) -> None:
        fake, events = FakeTrainer(tmp_path, process=ProcessInfo(0, 2, 0, 2)), RunEvents()
        fake.resumed_from = tmp_path / "checkpoints/epoch_0000"
        events.on_fit_start(fake.trainer)
        callback = opened(fake, events)
        record = graft_record(0, diverged={1: "NaN"})
        for fake.epoch in (1, 2):
            events.on_round_end(fake.trainer, record)
            callback.on_round_end(fake.trainer, record)
        callback.teardown(fake.trainer)
        shown = texts(tmp_path / "population")["run/events"]
        assert list(shown) == [0, 1]
        assert "network 1 has NaN" not in shown[0]
        rows = shown[1].splitlines()[2:]
        assert [row.split(" | ")[1:3] for row in rows] == [["0", "resumed"], ["1", "diverged"]]
        assert "resumed from" in rows[0]
        assert "network 1 has NaN" in rows[1]

    def test_a_deleted_folder_is_recreated(self, tmp_path: Path) -> None:
        """Even if another callback recreates the folder first."""
        fake = FakeTrainer(tmp_path / "run", config=TrainConfig(epochs=100))
        callback, metrics = opened(fake), MetricsJsonl()
        metrics.on_fit_start(fake.trainer)
        for fake.epoch in range(3):
            if fake.epoch == 1:
                fake.run_dir.rename(tmp_path / "gone")
            for one in (metrics, callback):
                one.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(fake.epoch)))
        callback.teardown(fake.trainer)
        assert set(scalars(tmp_path / "run/network00")["accuracy/test"]) == {1, 2}


def test_hparams_of_networks_that_differ() -> None:
    config = TrainConfig(
        members=[{"optim.lr": 0.2, "optim.weight_decay": 1e-3}, {"optim.name": "adamw"}],
        diversity={"data.mixup": {"choice": [0.5]}, "data.rand_augment": {"choice": [None]}},
    )
    differing = differing_options(config)
    rows = [
        hparams(member_config(config, network), lr, 2, differing=differing)
        for network, lr in enumerate((0.2, 0.1))
    ]
    shown = [{name: row[name] for name in ("lr", "weight_decay", "optimizer")} for row in rows]
    assert shown == [
        {"lr": 0.2, "weight_decay": 1e-3, "optimizer": "sgd"},
        {"lr": 0.1, "weight_decay": 5e-4, "optimizer": "adamw"},
    ]
    assert [(row["mixup"], row["rand_augment"]) for row in rows] == [(0.5, "None")] * 2
    assert set(rows[0]) - set(hparams(TrainConfig(), 0.1, 2)) == {"mixup", "rand_augment"}


def test_hparams_of_parts_given_in_python() -> None:
    own = {"data": "custom", "model": "make_model", "optimizer": "custom", "loss": "custom"}
    options = hparams(TrainConfig(), 0.1, 2, own=own)
    assert {name: options[name] for name in ("data", "model", "optimizer")} == {
        name: own[name] for name in ("data", "model", "optimizer")
    }
    assert not {"loss", "weight_decay"} & set(options)


def test_hparams() -> None:
    options = hparams(TrainConfig(seed=7, method="papa"), 0.1, 2)
    assert (options["lr"], options["seed"], options["method"]) == (0.1, 7, "papa")
    assert options["networks"] == 2
    assert "amplitude" not in options
    assert hparams(TrainConfig(graft=GraftConfig(amplitude=0.3)), 0.1, 1)["amplitude"] == 0.3
