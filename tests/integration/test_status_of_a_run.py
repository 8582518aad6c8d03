"""`dist-graft status` of real runs: while they go on, and after each way to end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from launching import background, children, end_of, torchrun, wait_until

from dist_graft.analysis.status.judging import judge
from dist_graft.analysis.status.reading import read_run
from dist_graft.analysis.status.showing import as_json
from dist_graft.errors import RunDirectoryError

LONG = ("--epochs", "2000", "--optim.schedule", "constant", "--model.name", "resnet8")


def told(path: Path) -> dict[str, Any]:
    try:
        run, now = read_run(path), time.time()
    except RunDirectoryError:
        return {"state": "nothing", "networks": []}
    content: dict[str, Any] = json.loads(as_json(run, judge(run, now), now, indent=None))
    assert not content["problems"]
    return content


def test_a_run_that_finished(pair: Path) -> None:
    seen = told(pair)
    assert seen["state"] == "finished"
    assert [row["epochs_finished"] for row in seen["networks"]] == [3, 3]
    assert [row["round"] for row in seen["networks"]] == [2, 2]
    assert [row["donor"] for row in seen["networks"]] == [1, 0]
    summary = json.loads((pair / "summary.json").read_text())
    accuracies = [row["accuracy_before_last_round"] for row in summary["networks"]]
    assert [row["test_accuracy"] for row in seen["networks"]] == accuracies


def test_a_run_that_goes_on_is_stopped_goes_on_again_and_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def goes_on() -> bool:
        seen = told(path)
        rows = seen["networks"]
        steps = [row["phase"] != "starting" and row["epochs_finished"] for row in rows]
        return seen["state"] == "running" and len(rows) == 2 and all(steps)

    with background([torchrun(2, path, *LONG)]) as (launcher,):
        wait_until(goes_on, "two networks that train", meanwhile=[launcher])
        assert told(path)["seconds_left"] > 0
        (path / "STOP").touch()
        end_of(launcher, 60)
    seen = told(path)
    assert seen["state"] == "stopped"
    assert "the same command goes on from" in seen["words"]
    assert [row["phase"] for row in seen["networks"]] == ["stopped", "stopped"]

    with background([torchrun(2, path, *LONG)]) as (launcher,):
        wait_until(goes_on, "the same two", meanwhile=[launcher])
        before = told(path)
        pids = children(launcher)
        for pid in pids:  # else one may see the launcher's store go, and still say so
            os.kill(pid, signal.SIGSTOP)
        launcher.kill()
        wait_until(lambda: told(path)["state"] == "died", "the news of their death")
    assert told(path)["words"].startswith("died: networks 0, 1 gave the last sign of life")
    assert before["newest_set"]
    assert len(pids) == 2


def test_a_run_that_failed_says_which_network_did(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with background([torchrun(2, path, *LONG)]) as (launcher,):
        wait_until(
            lambda: bool(told(path)["networks"]) and told(path)["networks"][0]["epochs_finished"],
            "an epoch",
            meanwhile=[launcher],
        )
        os.kill(children(launcher)[1], signal.SIGKILL)
        end_of(launcher, 90)
        wait_until(lambda: told(path)["state"] in ("failed", "died"), "an end")
    assert "network 1" in told(path)["words"]
