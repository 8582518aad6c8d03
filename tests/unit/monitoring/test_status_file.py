from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_graft.errors import NonFiniteError, StoppedEarlyError
from dist_graft.monitoring import status_file as live
from dist_graft.monitoring.console import ProgressBar
from dist_graft.monitoring.status_file import Pace, StatusFile


def told(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def a_live(path: Path) -> StatusFile:
    return StatusFile(path, 1, ProgressBar("lines", show=False))


def test_who_is_there_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with a_live(path):
        assert told(path) | {"time": 0} == {
            **{"network": 1, "host": socket.gethostname(), "pid": os.getpid()},
            **{"phase": "starting", "epoch": 0, "epochs": 0, "step": 0, "steps_per_epoch": 0},
            **{"rounds": 0, "images_per_second": None, "seconds_left": None, "reason": None},
            "time": 0,
        }


def test_a_thread_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "status.json"
    with a_live(path) as running:
        running.prepare(epochs=3, steps_per_epoch=4, batch_size=10, rounds=2)
        running.begin(1, 2)
        running.step()
        deadline = time.monotonic() + 60
        while told(path)["step"] != 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen = told(path)
    assert (seen["phase"], seen["epoch"], seen["rounds"]) == ("training", 1, 2)
    assert seen["images_per_second"] > 0
    assert seen["seconds_left"] > 0
    assert "status.json" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("error", "phase", "reason"),
    [
        (None, "finished", None),
        (StoppedEarlyError("by a file"), "stopped", "by a file"),
        (NonFiniteError("a weight\nis NaN"), "failed", "a weight is NaN"),
        (KeyError(), "failed", "KeyError"),
    ],
)
def test_the_last_word(
    tmp_path: Path, error: Exception | None, phase: str, reason: str | None
) -> None:
    path = tmp_path / "status.json"

    def end() -> None:
        with a_live(path) as running:
            running.prepare(epochs=1, steps_per_epoch=1, batch_size=1, rounds=0)
            running.begin(0, 0)
            running.step()
            running.met(1)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            end()
    else:
        end()
    assert (told(path)["phase"], told(path)["reason"]) == (phase, reason)
    assert (told(path)["rounds"], told(path)["seconds_left"]) == (1, None)


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    with a_live(tmp_path / "nowhere" / "status.json"):
        pass
    assert not list(tmp_path.iterdir())


class TestPace:
    def test_nothing_is_known_before_the_first_step(self) -> None:
        pace = Pace(3, 10)
        assert pace.left(0, 0, 5.0) is None
        pace.begin(0, 0, 5.0)
        assert pace.left(0, 0, 7.0) is None

    def test_in_the_first_epoch_by_its_steps(self) -> None:
        pace = Pace(3, 10)
        pace.begin(0, 0, 100.0)
        assert pace.left(0, 5, 110.0) == 50.0

    def test_afterwards_by_the_last_whole_epoch(self) -> None:
        """An epoch takes as long as it takes, evaluation and waiting included."""
        pace = Pace(3, 10)
        pace.begin(0, 0, 100.0)
        pace.begin(1, 0, 140.0)
        assert pace.left(1, 0, 140.0) == 80.0
        assert pace.left(2, 10, 300.0) == 0.0

    def test_an_epoch_that_was_entered_in_the_middle_is_no_measure(self) -> None:
        pace = Pace(3, 10)
        pace.begin(1, 8, 100.0)
        pace.begin(2, 0, 104.0)
        assert pace.left(2, 2, 108.0) == 16.0
