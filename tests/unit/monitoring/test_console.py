from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest

from dist_graft.monitoring.console import (
    NetworkRow,
    ProgressBar,
    epoch_text,
    summary_text,
    table,
)

ROW = NetworkRow(
    lr=0.05,
    train_loss=1.23456,
    train_accuracy=45.678,
    test_loss=2.5,
    test_accuracy=40.0,
    images_per_second=1234.5,
    donor=-1,
    smallest_coefficient=1.0,
    largest_coefficient=1.0,
    busy_seconds=7.5,
    epoch_seconds=8.25,
    sound=1.0,
)


def test_columns_are_aligned_to_the_right() -> None:
    assert table(("a", "long name"), [("123", "4"), ("5", "67")]) == (
        "  a  long name\n123          4\n  5         67"
    )


def test_a_row_survives_being_sent_as_numbers() -> None:
    assert NetworkRow(*ROW.numbers()) == ROW
    assert all(isinstance(number, (int, float)) for number in ROW.numbers())


def test_one_line_a_network_after_an_epoch() -> None:
    grafted = dataclasses.replace(
        ROW, donor=0.0, smallest_coefficient=0.304, largest_coefficient=0.696
    )
    title, header, first, second = epoch_text(2, 10, 3.21, [ROW, grafted]).splitlines()
    assert title == "epoch 3/10 (3.2 s)"
    assert " ".join(header.split()) == (
        "network lr train loss train % test loss test % images/s keeps"
    )
    assert first.split() == ["0", "0.05", "1.2346", "45.68", "2.5000", "40.00", "1234", "all"]
    assert second.split()[-4:] == ["0.30-0.70,", "rest", "of", "0"]


def test_the_line_of_a_network_that_diverged_says_so() -> None:
    lost = dataclasses.replace(ROW, train_loss=math.nan, donor=1.0, sound=0.0)
    line = epoch_text(0, 1, 1.0, [ROW, lost]).splitlines()[-1]
    assert line.split() == ["1", "0.05", "nan", "45.68", "2.5000", "40.00", "1234", "diverged"]


def test_the_closing_table() -> None:
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


class TestProgressBar:
    @pytest.mark.parametrize(("mode", "show"), [("lines", True), ("auto", True), ("bar", False)])
    def test_nothing_where_it_is_not_wanted(
        self, capfd: pytest.CaptureFixture[str], mode: Literal["auto", "bar", "lines"], show: bool
    ) -> None:
        """Auto shows none here: the output is captured, and no terminal."""
        bar = ProgressBar(mode, show=show)
        bar.start(steps=3, epoch=0, epochs=2)
        bar.step()
        bar.stop()
        assert capfd.readouterr().err == ""

    def test_counts_the_steps_of_the_epoch(self, capfd: pytest.CaptureFixture[str]) -> None:
        bar = ProgressBar("bar", show=True)
        bar.start(steps=1, epoch=1, epochs=4)
        bar.step()
        bar.stop()
        shown = capfd.readouterr().err
        assert "epoch 2/4" in shown
        assert "0/1" in shown
