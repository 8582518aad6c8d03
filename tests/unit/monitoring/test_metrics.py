"""Results of an epoch, and the callback that writes them to metrics.jsonl."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, epoch_metrics, epoch_report, network_row
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring import metrics
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.metrics import NetworkRow

GRAFT = {"round": 0, "donor": 1, "coefficient": {"conv1": 0.25, "conv2": 0.5}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def started(fake: FakeTrainer) -> MetricsJsonl:
    callback = MetricsJsonl()
    callback.on_fit_start(fake.trainer)
    return callback


def write(callback: MetricsJsonl, fake: FakeTrainer, epoch: int, **values: Any) -> None:
    callback.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(epoch, **values)))


class TestLine:
    def test_its_keys(self) -> None:
        line = epoch_metrics(3).to_json()
        assert line == {
            **{"epoch": 3, "lr": 0.5, "train_loss": 2.5, "train_accuracy": 12.5},
            **{"test_loss": 2.25, "test_accuracy": 25.0, "val_loss": None, "val_accuracy": None},
            **{"images_per_second": 100.0, "phase_seconds": {"step": 3.0, "other": 1.0}},
            **{"information": {"conv1": 1.5, "conv2": 2.0}, "graft": None},
        }

    def test_other_metrics_and_splits(self) -> None:
        values = {"loss": 1.0, "iou": 0.5, "dice": 0.25}
        line = epoch_metrics(0, train=values, test=values, val=values, ema_test=values).to_json()
        for split in ("train", "test", "val", "ema_test"):
            assert {name: line[f"{split}_{name}"] for name in values} == values
        assert "test_accuracy" not in line


class TestNetworkRow:
    def test_it_survives_being_gathered_as_numbers(self) -> None:
        row = network_row()
        assert NetworkRow(*row.numbers()) == row
        assert all(isinstance(number, (int, float)) for number in row.numbers())

    def test_it_is_made_from_the_metrics(self) -> None:
        found = metrics.network_row(
            epoch_metrics(0, graft=GRAFT),
            metric="accuracy",
            busy_seconds=7.5,
            epoch_seconds=8.25,
            finite=True,
        )
        assert found == NetworkRow(
            **{"lr": 0.5, "train_loss": 2.5, "train_metric": 12.5, "test_loss": 2.25},
            **{"test_metric": 25.0, "images_per_second": 100.0, "donor": 1},
            **{"min_coefficient": 0.25, "max_coefficient": 0.5, "busy_seconds": 7.5},
            **{"epoch_seconds": 8.25, "finite": 1.0},
        )

    def test_without_a_round_or_metrics(self) -> None:
        found = metrics.network_row(
            epoch_metrics(0), metric=None, busy_seconds=1.0, epoch_seconds=1.0, finite=False
        )
        assert (found.donor, found.min_coefficient, found.max_coefficient) == (-1, 1.0, 1.0)
        assert math.isnan(found.train_metric)
        assert math.isnan(found.test_metric)
        assert found.finite == 0.0


class TestMetricsJsonl:
    def test_one_line_per_epoch(self, tmp_path: Path) -> None:
        fake = FakeTrainer(tmp_path)
        callback = started(fake)
        write(callback, fake, 0, train={"loss": math.nan, "accuracy": 1.0})
        write(callback, fake, 1, graft=GRAFT, lr=1 / 3)
        first, second = lines(fake.directory.metrics(0))
        assert (first["epoch"], first["train_loss"], first["graft"]) == (0, None, None)
        assert (second["lr"], second["graft"]) == (1 / 3, GRAFT)

    @given(st.integers(0, 6), st.integers(0, 7), st.floats(0, 1))
    def test_a_resumed_run_drops_later_and_truncated_lines(
        self, epochs: int, start: int, share: float
    ) -> None:
        """Complete lines before the start are kept wherever the file is truncated."""
        with tempfile.TemporaryDirectory() as folder:
            fake = FakeTrainer(Path(folder))
            callback, path = started(fake), fake.directory.metrics(0)
            for epoch in range(epochs):
                write(callback, fake, epoch)
            whole = path.read_bytes()
            cut = round(share * len(whole))
            path.write_bytes(whole[:cut])
            lines_left = whole[: cut + 1].split(b"\n")
            survived = [line for line in lines_left if line.endswith(b'"graft": null}')]
            fake.epoch = start
            callback = started(fake)
            expected = list(range(min(start, len(survived))))
            assert [line["epoch"] for line in lines(path)] == expected
            write(callback, fake, start, lr=99.0)
            assert [line["epoch"] for line in lines(path)] == [*expected, start]
            assert lines(path)[-1]["lr"] == 99.0
            assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("line", ["5", "[]", "null", "{}", '{"epoch": null}', "{", "\x00"])
    def test_other_lines_are_dropped(self, tmp_path: Path, line: str) -> None:
        fake = FakeTrainer(tmp_path)
        path = fake.directory.metrics(0)
        write(started(fake), fake, 0)
        kept = path.read_text()
        path.write_text(f"{line}\n{kept}{line}\n")
        fake.epoch = 1
        started(fake)
        assert path.read_text() == kept

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        fake = FakeTrainer(tmp_path)
        fake.directory.network(0).rmdir()
        fake.directory.network(0).write_text("here")
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl cannot be written.*run_dir"):
            started(fake)

    def test_a_full_disk_is_named(self, tmp_path: Path) -> None:
        fake = FakeTrainer(tmp_path)
        callback, path = started(fake), fake.directory.metrics(0)
        path.unlink()
        path.symlink_to("/dev/full")
        with pytest.raises(
            RunDirectoryError, match=r"metrics\.jsonl cannot be written: No space left.*free space"
        ):
            write(callback, fake, 0)

    def test_a_deleted_run_directory_is_recreated(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fake = FakeTrainer(tmp_path / "run")
        callback, path = started(fake), fake.directory.metrics(0)
        write(callback, fake, 0)
        fake.run_dir.rename(tmp_path / "gone")
        write(callback, fake, 1)
        write(callback, fake, 2)
        assert [line["epoch"] for line in lines(path)] == [1, 2]
        assert fake.directory.read_config()[0].run_dir == fake.config.run_dir
        assert sum("was deleted: it is recreated" in message for message in caplog.messages) == 1
