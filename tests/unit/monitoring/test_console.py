from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Literal

import pytest
from fake_trainer import FakeTrainer, epoch_metrics, epoch_report, network_row

from dist_graft.config import TrainConfig
from dist_graft.monitoring.console import (
    EpochLog,
    ProgressBar,
    duration,
    epoch_text,
    summary_text,
)
from dist_graft.monitoring.metrics import NetworkRow
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.callbacks import CallbackList

ROW = network_row()


def text_of(
    *rows: NetworkRow, epoch: int = 0, epochs: int = 1, metric: str | None = "accuracy"
) -> str:
    report = epoch_report(epoch_metrics(epoch), networks=rows)
    return epoch_text(dataclasses.replace(report, metric=metric), epochs)


def test_one_line_per_network_after_an_epoch() -> None:
    grafted = dataclasses.replace(ROW, donor=0.0, min_coefficient=0.304, max_coefficient=0.696)
    title, header, first, second = text_of(ROW, grafted, epoch=2, epochs=10).splitlines()
    assert title == "epoch 3/10 (3.2 s)"
    assert " ".join(header.split()) == (
        "network lr train loss train % test loss test % images/s keeps"
    )
    assert first.split() == ["0", "0.05", "1.2346", "45.68", "2.5000", "40.00", "1234", "all"]
    assert second.split()[-4:] == ["0.30-0.70,", "rest", "of", "0"]


def test_the_line_of_a_diverged_network() -> None:
    lost = dataclasses.replace(ROW, train_loss=math.nan, donor=1.0, finite=0.0)
    line = text_of(ROW, lost).splitlines()[-1]
    assert line.split() == ["1", "0.05", "nan", "45.68", "2.5000", "40.00", "1234", "diverged"]


def test_a_huge_loss_is_short() -> None:
    huge = dataclasses.replace(ROW, train_loss=5.1878e23, test_loss=-2e5)
    line = text_of(huge).splitlines()[-1]
    assert line.split()[2:6:2] == ["5.19e+23", "-2e+05"]


def test_the_table_of_final_results() -> None:
    summary = {
        "networks": [
            {
                "network": k,
                "lr": 0.1,
                "accuracy_before_last_round": 50.0 + k,
                "accuracy_after_last_round": 60.0 + k,
            }
            for k in range(2)
        ],
        "mean_accuracy_before_last_round": 50.5,
        "mean_accuracy_after_last_round": 60.5,
        "ensemble_accuracy_before_last_round": 70.123,
        "ensemble_accuracy_after_last_round": 71.0,
        "wall_seconds": 1.0,
    }
    rows = [line.split() for line in summary_text(summary).splitlines()]
    assert rows[1:] == [
        ["network", "0", "(lr", "0.1)", "50.00", "60.00"],
        ["network", "1", "(lr", "0.1)", "51.00", "61.00"],
        ["mean", "50.50", "60.50"],
        ["ensemble", "70.12", "71.00"],
    ]


def test_other_metrics_have_four_digits_and_their_name() -> None:
    _, header, row = text_of(ROW, metric="iou").splitlines()
    assert "train iou" in header
    assert "45.6780" in row.split()
    _, header, row = text_of(ROW, metric=None).splitlines()
    assert " ".join(header.split()) == "network lr train loss test loss images/s keeps"
    assert row.split() == ["0", "0.05", "1.2346", "2.5000", "1234", "all"]
    summary = {
        "metric": "iou",
        "networks": [
            {"network": 0, "lr": 0.1, "iou_before_last_round": 0.5, "iou_after_last_round": None}
        ],
        "mean_iou_before_last_round": 0.5,
        "mean_iou_after_last_round": math.nan,
    }
    rows = [line.split() for line in summary_text(summary).splitlines()]
    assert rows[0][:2] == ["test", "iou"]
    assert rows[1:] == [
        ["network", "0", "(lr", "0.1)", "0.5000", "nan"],
        ["mean", "0.5000", "nan"],
    ]


def test_the_epoch_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fake, callback = FakeTrainer(tmp_path, config=TrainConfig(epochs=10)), EpochLog()
    callback.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(2), networks=[ROW, ROW]))
    callback.on_fit_end(fake.trainer)
    assert caplog.messages == [text_of(ROW, ROW, epoch=2, epochs=10)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (61, "1 min 1 s"),
        (3599.6, "1 h 0 min"),
        (3 * 3600 + 120, "3 h 2 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class TestProgressBar:
    def run(self, fake: FakeTrainer, mode: Literal["auto", "bar", "lines"]) -> None:
        status = StatusFile()
        callbacks = CallbackList([status, ProgressBar(mode, status)], [])
        for hook in ("setup", "on_fit_start", "on_epoch_start"):
            callbacks.call(hook, fake.trainer)
        fake.step += 1
        for hook in ("on_step_end", "on_evaluate_start", "teardown"):
            callbacks.call(hook, fake.trainer)

    @pytest.mark.parametrize(
        ("mode", "process"),
        [("lines", ProcessInfo()), ("auto", ProcessInfo()), ("bar", ProcessInfo(1, 2, 1, 2))],
    )
    def test_there_is_none(
        self,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        mode: Literal["auto", "bar", "lines"],
        process: ProcessInfo,
    ) -> None:
        """progress=auto: captured output is not a terminal."""
        self.run(FakeTrainer(tmp_path, process=process), mode)
        assert capfd.readouterr().err == ""

    def test_it_counts_the_steps_of_the_epoch(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        config = TrainConfig(epochs=4)
        self.run(FakeTrainer(tmp_path, config=config, epoch=1, step=1, steps_per_epoch=3), "bar")
        shown = capfd.readouterr().err
        assert "epoch 2/4" in shown
        assert "1/3" in shown
        assert "2/3" in shown
        assert "left" in shown
