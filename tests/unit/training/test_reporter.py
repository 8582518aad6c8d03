from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from dist_graft.training.reporting import slow_networks
from reading import metrics, scalars

from dist_graft.monitoring.console import NetworkRow

ROW = NetworkRow(*[1.0] * 9, busy_seconds=10.0, epoch_seconds=20.0, sound=1.0)


def busy(*seconds: float, whole: float = 20.0) -> list[NetworkRow]:
    return [dataclasses.replace(ROW, busy_seconds=one, epoch_seconds=whole) for one in seconds]


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
def test_who_is_slow(seconds: tuple[float, ...], slow: dict[int, float]) -> None:
    assert slow_networks(busy(*seconds)) == pytest.approx(slow)


def test_nobody_is_slow_in_an_epoch_that_not_all_have_lived_through() -> None:
    everyone = busy(10, 30, 10)
    everyone[2] = dataclasses.replace(everyone[2], epoch_seconds=0.0)
    assert slow_networks(everyone) == {}


FULL = """
import logging
import resource, sys
from pathlib import Path
import torch
from dist_graft import Graft
from dist_graft.config import TrainConfig
from dist_graft.monitoring.console import NetworkRow
from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.monitoring.tensorboard import LayerView
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.round.record import GraftRecord
from dist_graft.training.schedule import Position
from dist_graft.training.reporting import Reporter
from dist_graft.run_directory import RunDirectory

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
directory = RunDirectory(sys.argv[1])
for folder in (directory.network(0), directory.population):
    folder.mkdir(parents=True)
directory.describe(TrainConfig(epochs=4), 2)
reporter = Reporter(
    TrainConfig(epochs=4), directory, ProcessInfo(0, 2, 0, 2), start=Position(), hosts=["a", "b"],
    log=logging.getLogger("test"),
)
mixing = Graft().decide(torch.zeros(2, 1, dtype=torch.float64), 0)
layers = LayerView(criterion="entropy", information={"a": 1.0}, invalid={0.1: {"a": 1}})
for epoch in range(4):
    room = resource.RLIM_INFINITY if epoch in (0, 3) else 16
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    healed = {1: 0} if epoch in (1, 3) else {}
    reporter.round(epoch, GraftRecord(
        round=epoch, network=0, donor=1, coefficient={"a": 0.5}, information={}, distance={},
        seconds=1.0, phase_seconds={}, bytes_received=0,
        diverged={1: "a bad loss"} if epoch else {}, healed=healed, mixing=mixing,
    ))
    reporter.network(EpochMetrics(
        epoch=epoch, lr=0.1, train_loss=1.0, train_accuracy=1.0, test_loss=1.0, test_accuracy=25.0,
        val_loss=None, val_accuracy=None, images_per_second=1.0, phase_seconds={"step": 1.0},
        information={"a": 1.0}, graft=None,
    ), layers)
    reporter.population(epoch, epoch + 1, 1.0, [
        NetworkRow(*[1.0] * 9, busy_seconds=seconds, epoch_seconds=20.0, sound=1.0)
        for seconds in (5.0, 5.0 if epoch == 0 else 15.0)
    ], None)
summary = {"networks": [
    {"network": k, "lr": 0.1, "accuracy_before_last_round": 1.0, "accuracy_after_last_round": 2.0}
    for k in range(2)
]}
for name in ("mean", "ensemble"):
    for when in ("before", "after"):
        summary[f"{name}_accuracy_{when}_last_round"] = 3.0
reporter.summary(summary)
reporter.close()
"""


def test_a_disk_that_is_full_for_a_while_is_endured(tmp_path: Path) -> None:
    """Numbers and events are written later; TensorBoard lacks the epochs that were refused."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert [line["epoch"] for line in metrics(run, 0)] == [0, 1, 2, 3]
    told = [json.loads(line) for line in (run / "population/events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["epoch"], event["network"]) for event in told] == [
        ("healed", 1, 1),
        ("slow", 1, 1),
        ("diverged", 2, 1),
        ("healed", 3, 1),
    ]
    assert json.loads((run / "summary.json").read_text())["events"] == told
    shown = scalars(run / "network00")["accuracy/test"]
    assert {0, 3} <= set(shown)
    assert {0, 3} <= set(scalars(run / "population")["population/test_accuracy_mean"])
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert any("metrics.jsonl cannot be written: File too large" in line for line in warnings)
    assert any("the events of epoch 2 are lost" in line for line in warnings)
    assert any(
        "network 1 has a bad loss: it took the weights of network 0 whole" in line
        for line in warnings
    )
    assert sum("network 1 is slow: its epoch took 15.0 s, 3.0 times" in w for w in warnings) == 1
    assert not any("epoch 1 " in line for line in warnings)
