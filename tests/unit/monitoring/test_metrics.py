from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.metrics import EpochMetrics, MetricsFile


def of_epoch(epoch: int, **values: Any) -> EpochMetrics:
    given_values: dict[str, Any] = {
        "lr": 0.1,
        "train_loss": 2.5,
        "train_accuracy": 12.5,
        "test_loss": 2.25,
        "test_accuracy": 25.0,
        "val_loss": None,
        "val_accuracy": None,
        "images_per_second": 100.0,
        "phase_seconds": {"step": 2.0},
        "information": {"conv1": 1.5},
        "graft": None,
    }
    return EpochMetrics(epoch=epoch, **{**given_values, **values})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, start_epoch=0)
    graft = {"round": 0, "donor": 1, "coefficient": {"conv1": 0.25}}
    file.write(of_epoch(0))
    file.write(of_epoch(1, graft=graft, lr=1 / 3))
    first, second = lines(path)
    assert first["epoch"] == 0
    assert first["graft"] is None
    assert second["lr"] == 1 / 3
    assert second["graft"] == graft


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_becomes_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    graft = {"seconds": 1.0, "information": {"conv1": value}}
    MetricsFile(path, start_epoch=0).write(of_epoch(0, train_loss=value, graft=graft))
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["train_loss"] is None
    assert line["graft"] == {"seconds": 1.0, "information": {"conv1": None}}


@given(st.integers(0, 6), st.integers(0, 7), st.floats(0, 1))
def test_what_lies_past_the_start_or_was_cut_off_is_dropped(
    epochs: int, start: int, share: float
) -> None:
    """Whatever byte the file ends at: whole lines before the start stay, the rest goes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        file = MetricsFile(path, start_epoch=0)
        for epoch in range(epochs):
            file.write(of_epoch(epoch, test_accuracy=float(epoch)))
        whole = path.read_bytes()
        cut = round(share * len(whole))
        path.write_bytes(whole[:cut])
        survived = [line for line in whole[: cut + 1].split(b"\n") if line.endswith(b"}")]
        file = MetricsFile(path, start_epoch=start)
        expected = list(range(min(start, len(survived))))
        assert [line["epoch"] for line in lines(path)] == expected
        file.write(of_epoch(start, test_accuracy=99.0))
        assert [line["epoch"] for line in lines(path)] == [*expected, start]
        assert lines(path)[-1]["test_accuracy"] == 99.0
        assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["5", "[]", "null", "{}", '{"epoch": null}', "{", "\x00"])
def test_lines_of_something_else_are_dropped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, start_epoch=0).write(of_epoch(0))
    kept = path.read_text()
    path.write_text(f"{line}\n{kept}{line}\n")
    MetricsFile(path, start_epoch=1)
    assert path.read_text() == kept


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl cannot be written.*run_dir"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", start_epoch=0)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", start_epoch=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl cannot be written.*free space"):
        file.write(of_epoch(0))
