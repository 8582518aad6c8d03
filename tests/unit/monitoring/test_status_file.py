from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, epoch_metrics, epoch_report, graft_record

from dist_graft.config import DataConfig, TrainConfig
from dist_graft.errors import NonFiniteError, StoppedEarlyError
from dist_graft.monitoring import status_file
from dist_graft.monitoring.status_file import RemainingTime, StatusFile
from dist_graft.population.runtime.process_info import ProcessInfo

FIRST_OF_TWO = ProcessInfo(1, 2, 1, 2)


def content(fake: FakeTrainer) -> dict[str, Any]:
    path = fake.directory.status(fake.process.network)
    status: dict[str, Any] = json.loads(path.read_text())
    return status


@contextmanager
def running(fake: FakeTrainer) -> Iterator[StatusFile]:
    callback = StatusFile()
    callback.setup(fake.trainer)
    try:
        yield callback
    finally:
        callback.teardown(fake.trainer)


@pytest.fixture
def fake(tmp_path: Path) -> FakeTrainer:
    config = TrainConfig(epochs=3, data=DataConfig(batch_size=10))
    return FakeTrainer(tmp_path, config=config, process=FIRST_OF_TWO)


def test_the_process_is_known_at_once(fake: FakeTrainer) -> None:
    with running(fake):
        assert content(fake) | {"time": 0} == {
            **{"network": 1, "host": socket.gethostname(), "pid": os.getpid()},
            **{"phase": "starting", "epoch": 0, "epochs": 0, "step": 0, "steps_per_epoch": 0},
            **{"train_samples": 0, "rounds": 0, "images_per_second": None},
            **{"seconds_left": None, "reason": None, "time": 0},
        }


def test_a_process_that_ends_with_an_unreported_error_has_not_finished(fake: FakeTrainer) -> None:
    with suppress(KeyboardInterrupt), running(fake):
        raise KeyboardInterrupt
    assert content(fake)["phase"] == "starting"


def test_a_run_within_the_handler_of_an_error_finishes(fake: FakeTrainer) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with running(fake):
            pass
    assert content(fake)["phase"] == "finished"


def test_a_thread_writes_the_progress(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "HEARTBEAT_SECONDS", 0.01)
    with running(fake) as callback:
        fake.epoch, fake.step, fake.round = 1, 2, 2
        callback.on_fit_start(fake.trainer)
        callback.on_epoch_start(fake.trainer)
        fake.step = 3
        callback.on_step_end(fake.trainer)
        deadline = time.monotonic() + 60
        while content(fake)["step"] != 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen = content(fake)
    assert (seen["phase"], seen["epoch"], seen["rounds"]) == ("training", 1, 2)
    assert (seen["epochs"], seen["steps_per_epoch"], seen["train_samples"]) == (3, 4, 35)
    assert seen["images_per_second"] > 0
    assert seen["seconds_left"] > 0
    assert "status.json" not in [thread.name for thread in threading.enumerate()]


def test_the_phases_of_an_epoch(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "HEARTBEAT_SECONDS", 0.001)

    def reaches(phase: str) -> None:
        deadline = time.monotonic() + 60
        while content(fake)["phase"] != phase:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    with running(fake) as callback:
        callback.on_fit_start(fake.trainer)
        callback.on_epoch_start(fake.trainer)
        reaches("training")
        callback.on_evaluate_start(fake.trainer)
        reaches("evaluating")
        callback.on_round_start(fake.trainer)
        reaches("synchronizing")
        fake.round = 1
        callback.on_round_end(fake.trainer, graft_record(0))
        callback.on_epoch_end(fake.trainer, epoch_report(epoch_metrics(0)))
    assert (content(fake)["phase"], content(fake)["rounds"]) == ("finished", 1)


@pytest.mark.parametrize(
    ("error", "phase", "reason"),
    [
        (None, "finished", None),
        (StoppedEarlyError("by a file"), "stopped", "by a file"),
        (NonFiniteError("a weight\nis NaN"), "failed", "a weight is NaN"),
        (KeyError(), "failed", "KeyError"),
    ],
)
def test_how_the_run_ended(
    fake: FakeTrainer, error: Exception | None, phase: str, reason: str | None
) -> None:
    with running(fake) as callback:
        callback.on_fit_start(fake.trainer)
        if error:
            callback.on_exception(fake.trainer, error)
    assert (content(fake)["phase"], content(fake)["reason"]) == (phase, reason)
    assert content(fake)["seconds_left"] is None


def test_only_the_leader_of_a_network_writes(tmp_path: Path) -> None:
    fake = FakeTrainer(tmp_path, process=FIRST_OF_TWO.with_replicas(2))
    with running(fake) as callback:
        callback.on_fit_start(fake.trainer)
        callback.on_epoch_start(fake.trainer)
    assert not fake.directory.status(0).exists()


def test_a_disk_error_is_ignored(fake: FakeTrainer) -> None:
    fake.directory.network(1).rmdir()
    with running(fake):
        pass
    assert not fake.directory.network(1).exists()


class TestRemainingTime:
    def test_it_is_unknown_before_the_first_step(self) -> None:
        remaining = RemainingTime(3, 10)
        assert remaining.seconds(0, 0, 5.0) is None
        remaining.start_epoch(0, 0, 5.0)
        assert remaining.seconds(0, 0, 7.0) is None

    def test_in_the_first_epoch_it_follows_the_steps(self) -> None:
        remaining = RemainingTime(3, 10)
        remaining.start_epoch(0, 0, 100.0)
        assert remaining.seconds(0, 5, 110.0) == 50.0

    def test_later_it_follows_the_last_whole_epoch(self) -> None:
        """Including evaluation and waiting."""
        remaining = RemainingTime(3, 10)
        remaining.start_epoch(0, 0, 100.0)
        remaining.start_epoch(1, 0, 140.0)
        assert remaining.seconds(1, 0, 140.0) == 80.0
        assert remaining.seconds(2, 10, 300.0) == 0.0

    def test_a_partial_epoch_is_not_used(self) -> None:
        remaining = RemainingTime(3, 10)
        remaining.start_epoch(1, 8, 100.0)
        remaining.start_epoch(2, 0, 104.0)
        assert remaining.seconds(2, 2, 108.0) == 16.0
