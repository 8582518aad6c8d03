"""The unmodified launch/slurm_array.sbatch: four networks as an array on two slots."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from launching import wait_until
from reading import metrics

from dist_graft.analysis.run_files import read_run
from dist_graft.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/slurm_array.sbatch")
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "256", "--data.test_samples", "40"),
    *("--data.batch_size", "32", "--optim.schedule", "constant", "--runtime.device", "cpu"),
    *("--runtime.threads", "1", "--monitor.tensorboard", "false", "--epochs", "100000"),
)
LIMIT = 240
"""Timeout of an action that takes Slurm up to 30 s, while another job starts."""


@pytest.fixture
def cluster() -> Iterator[slurm.Slurm]:
    slurm.need_slurm()
    with slurm.two_nodes() as two:
        yield two


class Array:
    """An array of four tasks, of which two run at a time, each on a node of its own."""

    def __init__(self, cluster: slurm.Slurm, run: Path) -> None:
        self.cluster = cluster
        self.run = run
        self.job = cluster.submit(
            [SCRIPT, *SMALL, "--graft.max_lag", "1000"],  # however fast each task is
            *("--array=0-3%2", "--cpus-per-task=5", f"--chdir={ROOT}", f"--output={run}-%a.txt"),
            **{"RUN_DIR": str(run), "PYTHON": sys.executable},
        )

    def epochs(self, network: int) -> int:
        """Epochs that a network has finished."""
        path = RunDirectory(self.run).metrics(network)
        return len(metrics(self.run, network)) if path.exists() else 0

    def output(self, network: int) -> str:
        """Return the output of a task, over all of its starts."""
        return Path(f"{self.run}-{network}.txt").read_text()

    def state(self, network: int) -> str:
        """Slurm's state of a task; PENDING before it has a job of its own."""
        text = self.cluster.command("squeue", "-h", "-r", "-o", "%i %T", check=False)
        states = dict(re.findall(r"(\S+) (\S+)", text))
        return states.get(f"{self.job}_{network}", "ENDED")

    def running(self) -> list[int]:
        """Networks whose task runs."""
        return [network for network in range(4) if self.state(network) == "RUNNING"]

    def node(self, network: int) -> str:
        """Node of a task that runs."""
        task = f"{self.job}_{network}"
        return self.cluster.command("squeue", "-h", "-j", task, "-o", "%N")

    def wait_for_epochs(self, network: int, what: str, more: int = 2) -> None:
        """Wait until a network has finished some more epochs."""
        before = self.epochs(network)
        wait_until(lambda: self.epochs(network) >= before + more, what, seconds=LIMIT)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tasks_come_and_go_and_the_others_train_on(cluster: slurm.Slurm, tmp_path: Path) -> None:
    array = Array(cluster, tmp_path / "run")
    for network in (0, 1):
        array.wait_for_epochs(network, f"epochs of network {network}")
    assert [array.state(network) for network in (2, 3)] == ["PENDING"] * 2

    # One is cancelled for good: the next one takes its slot, and network 0 trains on.
    cluster.command("scancel", f"{array.job}_1")
    array.wait_for_epochs(0, "network 0 beside the cancelled one")
    array.wait_for_epochs(2, "network 2 in the slot of network 1")
    assert array.state(1) == "ENDED"

    # One is preempted: it saves a checkpoint, and resumes when the urgent job has ended.
    node = array.node(0)
    urgent = cluster.submit(
        ["--wrap=sleep 3"],
        *("--partition=high", f"--nodelist={node}", "--cpus-per-task=5", "--output=/dev/null"),
    )
    wait_until(
        lambda: "network 0 stopped early" in array.output(0), "the preemption", seconds=LIMIT
    )
    array.wait_for_epochs(2, "network 2 beside the preempted one")
    wait_until(lambda: cluster.ended(urgent), "the end of the urgent job", seconds=LIMIT)
    cluster.command("scancel", f"{array.job}_2")
    array.wait_for_epochs(0, "network 0 again")
    array.wait_for_epochs(3, "network 3 in the slot of network 2")
    assert "resumed from" in array.output(0)

    # A node is lost: its task is requeued and resumes, and the other one trains on.
    lost, kept = array.running()
    node = array.node(lost)
    starts = array.output(lost).count("resumed from")
    cluster.kill_node(node)
    array.wait_for_epochs(kept, "the network on the other node")
    wait_until(lambda: array.state(lost) != "RUNNING", "the loss of a node", seconds=LIMIT)
    cluster.start_node(node)
    wait_until(
        lambda: array.output(lost).count("resumed from") > starts, "its return", seconds=LIMIT
    )
    array.wait_for_epochs(lost, "its epochs")

    cluster.command("scancel", array.job)
    wait_until(lambda: not array.running(), "the end of the array", seconds=LIMIT)
    files = read_run(array.run)
    assert not files.problems
    for network in range(4):
        lines = metrics(array.run, network)
        assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert 1 in {line["graft"]["donor"] for line in metrics(array.run, 0)}
