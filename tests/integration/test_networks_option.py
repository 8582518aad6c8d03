"""`dist-graft train --networks K` and `dist_graft.train`, which start their own processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import (
    ERROR,
    PAIR,
    PROMPT_SECONDS,
    checkpoint_is_complete,
    program,
    run_program,
    running,
    wait_for_end,
    wait_until,
)
from reading import assert_same_bits, checkpoint

ENDLESS = ("--epochs", "100000", "--networks", "2")
LIMIT = 150
SCRIPT = """
import sys, yaml
from dist_graft import train
from dist_graft.config import TrainConfig
from dist_graft.config.parsing import from_mapping

if __name__ == "__main__":
    options = yaml.safe_load(open(sys.argv[1]))
    options.pop("run")
    config = from_mapping(TrainConfig, options | {"run_dir": sys.argv[2]})
    first, second = (train(config, networks=2) for _ in range(2))
    print(len(first["networks"]), second == first)
"""
SLOW_DATA = """
import os, time
from pathlib import Path
import numpy as np

def load(root):
    rank = os.environ.get("RANK", "0")
    Path(root, f"loading{rank}").touch()
    while Path(root, "wait").exists():
        time.sleep(0.02)
        if Path(root, f"fail{rank}").exists():
            raise LookupError("no such file")
    images, labels = np.zeros((64, 1, 32, 32), np.uint8), np.arange(64) % 4
    return (images, labels), (images, labels)
"""


def test_weights_equal_those_of_torchrun(pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_program(program(run, *PAIR, "--networks", "2"), timeout=LIMIT)
    assert done.status == 0, done
    assert not done.errors
    assert "2 of 2 networks on " in done.output
    for network in (0, 1):
        one, other = (checkpoint(path, 3, network) for path in (pair, run))
        assert_same_bits(one["model"], other["model"])


def test_train_in_python_returns_the_summary(pair: Path, tmp_path: Path) -> None:
    """The second call finds a complete run."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(pair / "config.yaml"), str(run)]
    done = run_program(command, timeout=LIMIT)
    assert done.status == 0, done
    assert done.output.splitlines()[-1] == "2 True"
    for network in (0, 1):
        one, other = (checkpoint(path, 3, network) for path in (pair, run))
        assert_same_bits(one["model"], other["model"])


@pytest.mark.parametrize(
    ("options", "status", "start"),
    [
        (["--model.name", "resnt20"], 2, "model.name 'resnt20' is unknown; nearest: resnet20"),
        (["--model.kwargs", '{"depth": 3}'], 2, "model.kwargs {'depth': 3} do not fit resnet20: "),
        (["--data.name", "imagefolder", "--data.root", "ROOT"], 1, "ROOT/train is missing"),
    ],
)
def test_an_error_of_all_networks_names_none(
    options: list[str], status: int, start: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    root = str(tmp_path / "data")
    words = [word.replace("ROOT", root) for word in options]
    done = run_program(program(run, *PAIR, "--networks", "2", *words), timeout=LIMIT)
    assert done.status == status
    (line,) = done.errors.splitlines()
    assert line.startswith(ERROR + start.replace("ROOT", root))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_is_called_a_stop(name: str, tmp_path: Path) -> None:
    """Ctrl-C and a closed terminal signal all processes; SIGTERM goes to the one that was started.

    The tests themselves may run under nohup.
    """
    run = tmp_path / "run"
    command = ["env", "--default-signal=HUP", *program(run, *ENDLESS)]
    with running([command], new_session=True) as (process,):
        wait_until(checkpoint_is_complete(run, 1), "the first epoch", meanwhile=[process])
        number = signal.Signals[name]
        if name == "SIGTERM":
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 75
    (line,) = done.errors.splitlines()
    assert line.startswith(f"dist-graft: stopped early by {name}; everything is saved in {run}")
    assert line.endswith("rerun the command to resume")
    assert (run / "STOPPED_EARLY").exists()


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = run / "network00" / "metrics.jsonl"
    command = ["nohup", *program(run, *ENDLESS)]
    with running([command], new_session=True) as (process,):
        wait_until(checkpoint_is_complete(run, 1), "the first epoch", meanwhile=[process])
        os.killpg(process.pid, signal.SIGHUP)
        epochs = len(metrics.read_text().splitlines())
        wait_until(
            lambda: len(metrics.read_text().splitlines()) > epochs + 2,
            "two more epochs",
            meanwhile=[process],
        )
        os.kill(process.pid, signal.SIGTERM)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 75
    assert "stopped early by SIGTERM" in done.errors


@pytest.mark.parametrize("networks_exist", [False, True])
def test_ctrl_c_while_the_run_starts_prints_nothing(networks_exist: bool, tmp_path: Path) -> None:
    """The processes are then importing torch, before any of their code can handle signals."""
    with running([program(tmp_path / "run", *ENDLESS)], new_session=True) as (process,):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        maps = Path(f"/proc/{process.pid}/maps")

        def is_starting() -> bool:
            if networks_exist:
                return len(children.read_text().split()) == 3  # and a tracker of resources
            return "libtorch" in maps.read_text()

        wait_until(is_starting, "the start", meanwhile=[process])
        os.killpg(process.pid, signal.SIGINT)
        # The networks import torch before they react.
        done = wait_for_end(process, LIMIT if networks_exist else PROMPT_SECONDS)
    assert done.status in (130, -signal.SIGINT)
    assert not done.errors
    assert not (tmp_path / "run").exists()


def test_a_killed_network_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([program(run, *ENDLESS)]) as (process,):
        wait_until(checkpoint_is_complete(run, 1), "the first epoch", meanwhile=[process])
        pid = json.loads((run / "network01/status.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 1
    (line,) = done.errors.splitlines()
    assert line.startswith(f"{ERROR}network 1 (rank 1 on ")
    assert "was killed by SIGKILL" in line


class SlowStart:
    """Starts a run whose data load as long as a file exists."""

    def __init__(self, folder: Path, networks: int) -> None:
        (folder / "slow_data.py").write_text(SLOW_DATA)
        self._folder, self._networks = folder, networks
        self.run = folder / "run"
        self.command = [
            *program(self.run, "--epochs", "100000", "--networks", str(networks)),
            *("--data.name", "slow_data:load", "--data.root", str(folder)),
        ]

    def running(self):
        """The run in a session of its own, as a context manager."""
        path = os.pathsep.join([str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return running([self.command], new_session=True, PYTHONPATH=path)

    @contextmanager
    def loading(self) -> Iterator[subprocess.Popen[str]]:
        """The run while all networks load their data."""
        marks = [self._folder / f"loading{network}" for network in range(self._networks)]
        for mark in marks:
            mark.unlink(missing_ok=True)
        wait = self._folder / "wait"
        wait.touch()
        with self.running() as (process,):
            wait_until(
                lambda: all(mark.exists() for mark in marks), "the data", meanwhile=[process]
            )
            yield process
        wait.unlink()

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.run.glob("network*/log.txt"))

    def phases(self) -> set[str]:
        files = self.run.glob("network*/status.json")
        return {json.loads(file.read_text())["phase"] for file in files}


@pytest.mark.parametrize("networks", [1, 2])
def test_a_stop_while_the_data_load(networks: int, tmp_path: Path) -> None:
    start = SlowStart(tmp_path, networks)
    line = "dist-graft: stopped by {} before training began; rerun the command to train"
    with start.loading() as process:
        os.killpg(process.pid, signal.SIGINT)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 130
    assert done.errors.splitlines() == [line.format("SIGINT")]

    with start.running() as (process,):
        wait_until(checkpoint_is_complete(start.run, 1), "the first epoch", meanwhile=[process])
        os.kill(process.pid, signal.SIGTERM)
        assert wait_for_end(process, PROMPT_SECONDS).status == 75

    with start.loading() as process:
        os.kill(process.pid, signal.SIGTERM)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 75  # there is a checkpoint to resume from
    assert done.errors.splitlines() == [line.format("SIGTERM")]
    assert "ERROR" not in start.logs()
    assert start.phases() == {"stopped"}
    command = [sys.executable, "-m", "dist_graft", "status", str(start.run)]
    shown = run_program(command, timeout=LIMIT).output
    assert "stopped by SIGTERM before training began" in shown.splitlines()[0]


def test_ctrl_c_under_torchrun_while_the_data_load(tmp_path: Path) -> None:
    start = SlowStart(tmp_path, 2)
    train = start.command[start.command.index("dist_graft") :]
    networks = train.index("--networks")
    launcher = "dist_graft.population.runtime.torchrun"
    start.command = [
        *(sys.executable, "-m", launcher, "--standalone", "--nproc-per-node=2", "-m"),
        *(*train[:networks], *train[networks + 2 :]),
    ]
    with start.loading() as process:
        os.killpg(process.pid, signal.SIGINT)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 130
    assert done.errors.count("stopped by SIGINT before training began") == 2
    assert start.phases() == {"stopped"}


def test_a_failure_while_the_data_load_is_no_stop(tmp_path: Path) -> None:
    """The launcher then stops the other network by SIGTERM."""
    start = SlowStart(tmp_path, 2)
    with start.loading() as process:
        (tmp_path / "fail1").touch()
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 1
    line = done.errors.splitlines()[-1]
    assert line.startswith(f"{ERROR}network 1 (rank 1 on ")
    assert "no such file" in line
    assert "before training began" not in start.logs()
    assert start.phases() == {"failed"}
    assert not (start.run / "STOPPED_EARLY").exists()
