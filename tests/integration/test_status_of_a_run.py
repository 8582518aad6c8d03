"""`dist-graft status` of real runs, while they train and after they end."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from launching import program, running, wait_for_end, wait_until
from reading import summary

from dist_graft.analysis.run_files import read_run
from dist_graft.analysis.status import facts, judge
from dist_graft.errors import RunDirectoryError

LONG = ("--epochs", "2000", "--optim.schedule", "constant", "--model.name", "resnet8")


def status_of(path: Path) -> dict[str, Any]:
    try:
        run, now = read_run(path), time.time()
    except RunDirectoryError:
        return {"state": "nothing", "networks": []}
    content: dict[str, Any] = facts(run, judge(run, now), now)
    assert not content["problems"]
    return content


def test_finished_run(pair: Path) -> None:
    seen = status_of(pair)
    assert seen["state"] == "finished"
    assert [row["epochs_finished"] for row in seen["networks"]] == [3, 3]
    assert [row["round"] for row in seen["networks"]] == [2, 2]
    assert [row["donor"] for row in seen["networks"]] == [1, 0]
    found = summary(pair)
    accuracies = [row["accuracy_before_last_round"] for row in found["networks"]]
    assert [row["test_accuracy"] for row in seen["networks"]] == accuracies


def test_run_is_stopped_resumed_and_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def is_training() -> bool:
        seen = status_of(path)
        rows = seen["networks"]
        steps = [row["phase"] != "starting" and row["epochs_finished"] for row in rows]
        return seen["state"] == "running" and len(rows) == 2 and all(steps)

    with running([program(path, *LONG)] * 2) as processes:
        wait_until(is_training, "two networks that train", meanwhile=processes)
        assert status_of(path)["seconds_left"] > 0
        (path / "STOP").touch()
        for process in processes:
            wait_for_end(process, 60)
    seen = status_of(path)
    assert seen["state"] == "stopped"
    assert "rerun the command to resume from" in seen["words"]
    assert [row["phase"] for row in seen["networks"]] == ["stopped", "stopped"]

    with running([program(path, *LONG)] * 2) as processes:
        wait_until(is_training, "the same two", meanwhile=processes)
        before = status_of(path)
        for process in processes:  # else one may report that the other is gone
            process.send_signal(signal.SIGSTOP)
        for process in processes:
            process.kill()
        wait_until(lambda: status_of(path)["state"] == "died", "their death to be noticed")
    assert status_of(path)["words"].startswith("died: last heartbeat of networks 0, 1")
    assert before["latest_checkpoint"]


def test_failed_run_names_the_network(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with running([program(path, *LONG)] * 2) as (first, second):
        wait_until(
            lambda: (
                bool(status_of(path)["networks"])
                and status_of(path)["networks"][0]["epochs_finished"]
            ),
            "an epoch",
            meanwhile=[first, second],
        )
        second.kill()
        wait_for_end(first, 90)
        wait_until(lambda: status_of(path)["state"] in ("failed", "died"), "an end")
    assert "network 1" in status_of(path)["words"]
