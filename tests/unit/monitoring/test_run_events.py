from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, epoch_metrics, epoch_report, graft_record, network_row
from reading import metrics, scalars

from dist_graft.monitoring.metrics import NetworkRow
from dist_graft.monitoring.run_events import Event, RunEvents, events_file, slow_networks
from dist_graft.population.runtime.process_info import ProcessInfo


def event(epoch: int, round_: int, kind: Any = "slow", network: int | None = 1) -> Event:
    return Event(kind=kind, epoch=epoch, round=round_, network=network, text=f"{epoch} {round_}")


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = events_file(path, start_epoch=0, start_round=0)
    file.write(asdict(event(0, 1, "healed")))
    file.write(asdict(event(2, 3, "resumed", None)))
    first, second = stored(path)
    assert {key: first[key] for key in ("kind", "epoch", "round", "network", "text")} == {
        "kind": "healed",
        "epoch": 0,
        "round": 1,
        "network": 1,
        "text": "0 1",
    }
    assert first["time"].endswith("+00:00")
    assert second["network"] is None


@pytest.mark.parametrize(
    ("start", "stay"),
    [
        ((0, 0), []),
        ((1, 2), ["0 0", "0 1"]),
        ((1, 3), ["0 0", "0 1", "1 2"]),
        ((1, 4), ["0 0", "0 1", "1 2", "1 3"]),
        ((2, 4), ["0 0", "0 1", "1 2", "1 3", "1 4"]),
        ((9, 9), ["0 0", "0 1", "1 2", "1 3", "1 4", "2 4"]),
    ],
)
def test_a_resumed_run_drops_later_events(
    tmp_path: Path, start: tuple[int, int], stay: list[str]
) -> None:
    """Events before the checkpoint and earlier resumes are kept."""
    path = tmp_path / "events.jsonl"
    file = events_file(path, start_epoch=0, start_round=0)
    for epoch, round_ in ((0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (2, 4)):
        file.write(asdict(event(epoch, round_)))
    file.write(asdict(event(5, 6, "resumed", None)))
    again = events_file(path, start_epoch=start[0], start_round=start[1])
    assert [kept["text"] for kept in again.kept] == [*stay, "5 6"]
    assert stored(path) == again.kept
    again.write(asdict(event(7, 8)))
    assert [kept["text"] for kept in stored(path)] == [*stay, "5 6", "7 8"]


def test_unwritten_events_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake, callback = FakeTrainer(tmp_path), RunEvents()
    path = fake.directory.events
    callback.on_fit_start(fake.trainer)
    path.unlink()
    path.mkdir()
    callback.on_round_end(fake.trainer, graft_record(0, diverged={1: "NaN"}))
    assert "events.jsonl cannot be written" in caplog.text
    assert [event["round"] for event in callback.events] == [0]
    path.rmdir()
    callback.on_round_end(fake.trainer, graft_record(1, diverged={0: "NaN"}))
    assert stored(path) == callback.events
    assert [event["network"] for event in callback.events] == [1, 0]


def busy(*seconds: float, whole: float = 20.0) -> list[NetworkRow]:
    return [network_row(busy_seconds=one, epoch_seconds=whole) for one in seconds]


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ((10, 10, 10), {}),
        ((10, 30, 10), {1: 3.0}),
        ((10, 20, 10), {}),
        ((10, 20.5, 10), {1: 2.05}),
        ((40, 10), {0: 4.0}),
        ((30, 30, 10, 10, 10), {0: 3.0, 1: 3.0}),
        ((2, 10, 18), {2: 3.0}),
        ((0.9, 0.1, 0.1), {}),
        ((1.1, 0.1, 0.1), {0: 11.0}),
        ((10, 0, 0), {}),
        ((10,), {}),
    ],
)
def test_slow_networks(seconds: tuple[float, ...], slow: dict[int, float]) -> None:
    assert slow_networks(busy(*seconds)) == pytest.approx(slow)


def test_no_network_is_slow_in_a_partial_epoch() -> None:
    assert slow_networks([*busy(10, 30), *busy(10, whole=0.0)]) == {}


class TestRunEvents:
    def test_only_rank_0_writes_and_all_log(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for rank in range(2):
            process = ProcessInfo(rank, 2, rank, 2)
            fake = FakeTrainer(tmp_path / str(rank), process=process, epoch=2, round=5)
            fake.resumed_from = Path("checkpoints/epoch_0002")
            callback = RunEvents()
            assert callback.events == []
            callback.on_fit_start(fake.trainer)
            callback.on_round_end(fake.trainer, graft_record(5, diverged={1: "NaN"}))
            assert len(callback.events) == (2 if rank == 0 else 0)
            assert fake.directory.events.exists() == (rank == 0)
        first, second = stored(tmp_path / "0/population/events.jsonl")
        assert (first["kind"], first["epoch"], first["round"]) == ("resumed", 2, 5)
        assert first["text"] == "resumed from checkpoints/epoch_0002"
        assert (second["kind"], second["epoch"], second["network"]) == ("diverged", 2, 1)
        levels = [record.levelno for record in caplog.records]
        assert levels == [logging.DEBUG, logging.WARNING] * 2

    def test_divergence_is_reported_when_it_begins_and_each_healing(self, tmp_path: Path) -> None:
        fake, callback = FakeTrainer(tmp_path), RunEvents()
        callback.on_fit_start(fake.trainer)
        for round_, (diverged, healed) in enumerate(
            [
                ({1: "NaN"}, {}),
                ({1: "NaN"}, {}),
                ({}, {}),
                ({1: "Inf"}, {}),
                *[({0: "x"}, {0: 1})] * 2,
            ]
        ):
            callback.on_round_end(
                fake.trainer, graft_record(round_, diverged=diverged, healed=healed)
            )
        assert [(event["round"], event["kind"]) for event in callback.events] == [
            *((0, "diverged"), (3, "diverged"), (4, "healed"), (5, "healed"))
        ]

    def test_a_slow_network_is_reported_when_it_becomes_slow(self, tmp_path: Path) -> None:
        fake, callback = FakeTrainer(tmp_path), RunEvents()
        callback.on_fit_start(fake.trainer)
        for epoch, seconds in enumerate([(10, 30, 10), (10, 30, 10), (10, 10, 10), (10, 30, 30)]):
            report = epoch_report(epoch_metrics(epoch), networks=busy(*seconds))
            callback.on_epoch_end(fake.trainer, report)
        assert [(event["epoch"], event["network"]) for event in callback.events] == [(0, 1)]
        report = epoch_report(epoch_metrics(4), networks=busy(10, 10, 30))
        callback.on_epoch_end(fake.trainer, report)
        assert callback.events[-1]["network"] == 2


FULL = """
import logging
import resource, sys
from pathlib import Path
from fake_trainer import FakeTrainer, epoch_metrics, epoch_report, graft_record, network_row
from dist_graft.config import TrainConfig
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.monitoring.tensorboard import TensorBoard
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.callbacks import CallbackList

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
fake = FakeTrainer(Path(sys.argv[1]), config=TrainConfig(epochs=4), process=ProcessInfo(0, 2, 0, 2))
events = RunEvents()
callbacks = CallbackList([events, MetricsJsonl(), TensorBoard(events)], [])
callbacks.call("on_fit_start", fake)
for fake.epoch in range(4):
    room = resource.RLIM_INFINITY if fake.epoch in (0, 3) else 16
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    callbacks.call("on_round_end", fake, graft_record(
        fake.epoch,
        diverged={1: "a non-finite loss"} if fake.epoch else {},
        healed={1: 0} if fake.epoch in (1, 3) else {},
    ))
    callbacks.call("on_epoch_end", fake, epoch_report(epoch_metrics(fake.epoch), networks=[
        network_row(busy_seconds=seconds, epoch_seconds=20.0)
        for seconds in (5.0, 5.0 if fake.epoch == 0 else 15.0)
    ]))
callbacks.call("teardown", fake)
"""


def test_a_temporarily_full_disk(tmp_path: Path) -> None:
    """Metrics and events are written later; TensorBoard lacks the epochs that failed."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert [line["epoch"] for line in metrics(run, 0)] == [0, 1, 2, 3]
    events = stored(run / "population/events.jsonl")
    assert [(event["kind"], event["epoch"], event["network"]) for event in events] == [
        ("healed", 1, 1),
        ("slow", 1, 1),
        ("diverged", 2, 1),
        ("healed", 3, 1),
    ]
    shown = scalars(run / "network00")["accuracy/test"]
    assert {0, 3} <= set(shown)
    assert {0, 3} <= set(scalars(run / "population")["population/test_accuracy_mean"])
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert any("metrics.jsonl cannot be written: File too large" in line for line in warnings)
    assert any("the events of epoch 2 are lost" in line for line in warnings)
    assert any(
        "network 1 has a non-finite loss: it copied the weights of network 0" in line
        for line in warnings
    )
    assert sum("network 1 is slow: its epoch took 15.0 s, 3.0 times" in w for w in warnings) == 1
    assert not any("epoch 1 " in line for line in warnings)
