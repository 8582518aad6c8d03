"""A run that is asked to stop saves inside an epoch and resumes exactly."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import (
    Process,
    checkpoint_is_complete,
    children,
    program,
    run_population,
    running,
    torchrun,
    wait_for_end,
    wait_until,
)
from reading import assert_same_bits, checkpoint, metrics, scalars

from dist_graft.population.runtime.process import SIGNALS

OPTIONS = (
    *("--epochs", "3", "--data.train_samples", "512", "--data.batch_size", "16"),
    *("--graft.every_steps", "7", "--optim.accumulation", "2", "--optim.warmup_epochs", "0.5"),
)


def signal_repeatedly(processes: list[Process], _: Path) -> None:
    """Send SIGUSR1, which the run reports, and then all signals until the process has exited."""
    process = processes[1]
    process.send_signal(signal.SIGUSR1)
    for number in itertools.cycle(SIGNALS):
        time.sleep(0.05)  # signals that are pending together have no order
        if process.poll() is not None:
            return
        process.send_signal(number)


STOP_REQUESTS: dict[str, Callable[[list[Process], Path], None]] = {
    "SIGUSR1, and more while saving": signal_repeatedly,
    "SIGTERM to the launcher": lambda processes, _: processes[0].terminate(),
    "STOP": lambda _, run: (run / "STOP").touch(),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_population(2, run, *OPTIONS)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("request_", STOP_REQUESTS)
def test_stops_inside_an_epoch_and_resumes_exactly(
    request_: str, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = run / "network00/metrics.jsonl"
    launched = "SIGUSR1" not in request_
    command = torchrun(2, run, *OPTIONS, restarts=3) if launched else program(run, *OPTIONS)
    with running([command] if launched else [command] * 2) as processes:
        wait_until(
            lambda: first.exists() and "\n" in first.read_text(), "epoch 1", meanwhile=processes
        )
        STOP_REQUESTS[request_](processes, run)
        ends = [wait_for_end(process, 25) for process in processes]
    name = re.split("[ ,]", request_)[0]
    for done in ends:
        assert done.status == (1 if launched else 75)
        assert "stopped early by " in done.errors
        assert "the launcher restarted it" not in done.errors
    assert (run / "network00/log.txt").read_text().count("epochs 1 to 3") == 1
    for network in (0, 1):
        (line,) = (run / f"network{network:02d}/log.txt").read_text().splitlines()[-1:]
        assert "stopped early by " in line
        assert name in line
        assert "rerun the command to resume" in line
    assert name in (run / "STOPPED_EARLY").read_text()
    (newest,) = run.glob("checkpoints/epoch_0001_round_*/COMPLETE.json")
    content = json.loads(newest.read_text())
    states = [torch.load(newest.with_name(f"network0{k}.pt"), weights_only=True) for k in (0, 1)]
    assert [{what: state[what] for what in ("epoch", "step")} for state in states] == (
        content["positions"]
    )
    assert {state["round"] for state in states} == {content["round"]}
    assert not (run / "summary.json").exists()

    run_population(2, run, *OPTIONS)
    assert f"resumed from {newest.parent}" in (run / "network00/log.txt").read_text()
    assert not (run / "STOPPED_EARLY").exists()
    assert not (run / "STOP").exists()
    for network in (0, 1):
        before, after = (checkpoint(path, 3, network) for path in (uninterrupted, run))
        assert_same_bits(before["model"], after["model"])
        assert before["round"] == after["round"]
        assert before["scheduler"] == after["scheduler"]
        for one, other in zip(metrics(uninterrupted, network), metrics(run, network), strict=True):
            for what in ("epoch", "lr", "test_loss", "test_accuracy", "train_accuracy"):
                assert one[what] == other[what]
            assert one["train_loss"] == pytest.approx(other["train_loss"])
            assert one["graft"]["rounds"] == other["graft"]["rounds"]
            assert one["graft"]["coefficient"] == other["graft"]["coefficient"]
        tags = scalars(run / f"network{network:02d}")
        assert all(list(values) == [0, 1, 2] for values in tags.values() if len(values) > 1)


@pytest.mark.slow
def test_nothing_is_saved_if_a_peer_died(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([torchrun(2, run, *OPTIONS, "--epochs", "50")]) as (launcher,):
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=[launcher])
        os.kill(children(launcher)[1], signal.SIGKILL)
        done = wait_for_end(launcher, 20)
    assert done.status == 1
    assert "stopped early" not in done.errors
    assert not (run / "STOPPED_EARLY").exists()
    assert "network 1 (rank 1 on " in done.errors
    files = [sorted(path.name for path in folder.iterdir()) for folder in run.glob("checkpoints/*")]
    assert all("COMPLETE.json" in names for names in files), "an incomplete checkpoint remains"
