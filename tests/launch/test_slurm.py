"""launch/slurm.sbatch, as it stands, on a real Slurm of two nodes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from launching import saved, wait_until
from reading import assert_same_bits, checkpoint, metrics

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/slurm.sbatch")
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "256", "--data.test_samples", "40"),
    *("--data.batch_size", "32", "--optim.schedule", "constant", "--seed", "3"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--checkpoint.keep", "1000"),
)
ENDLESS = "100000"
URGENT = "#!/bin/sh\nexec true\n"


def submit(cluster: slurm.Slurm, run: Path, epochs: str) -> str:
    """Submit the shipped script; what is said of the site is a setting or an option."""
    return cluster.submit(
        [SCRIPT, "--epochs", epochs, *SMALL],
        *("--nodes=2", "--cpus-per-task=2", "--signal=B:USR1@1", f"--chdir={ROOT}"),
        f"--output={run}.txt",
        RUN_DIR=str(run),
        HEAD="127.0.0.1",
        PYTHON=sys.executable,
    )


def epochs_saved(run: Path) -> int:
    """Finished epochs of the newest set that lies between two epochs."""
    done = [int(path.parent.name[6:]) for path in run.glob("checkpoints/epoch_????/COMPLETE.json")]
    return max(done, default=0)


@pytest.fixture
def cluster() -> Iterator[slurm.Slurm]:
    reason = slurm.missing()
    if reason and not os.environ.get("CI"):
        pytest.skip(reason)
    assert not reason, reason
    with slurm.two_nodes() as two:
        yield two


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_job_outlives_preemption_a_lost_node_and_its_time_limit(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """Whatever befell it, its weights are those of a job that nothing befell."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    job = submit(cluster, run, ENDLESS)

    def trains_again(restarts: int) -> None:
        before = epochs_saved(run)
        wait_until(
            lambda: (
                int(cluster.job(job)["Restarts"]) == restarts
                and cluster.job(job)["JobState"] == "RUNNING"
                and epochs_saved(run) > before
            ),
            f"training after {restarts} interruptions",
        )

    wait_until(saved(run, 1), "the first epoch")
    urgent = tmp_path / "urgent.sh"
    urgent.write_text(URGENT)
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = cluster.submit([str(urgent)], *options)
    wait_until((run / "STOPPED_EARLY").exists, "the stop for a more urgent job")
    wait_until(lambda: cluster.ended(other), "the end of the more urgent job")
    assert cluster.job(other)["JobState"] == "COMPLETED"
    trains_again(1)

    cluster.kill_node("n2")
    wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", "the loss of a node")
    cluster.start_node("n2")
    trains_again(2)

    cluster.command("scontrol", "update", f"JobId={job}", "EndTime=now+20")
    wait_until((run / "STOPPED_EARLY").exists, "the stop before the time limit")
    trains_again(3)

    cluster.command("scancel", job)
    wait_until(lambda: cluster.ended(job), "the end of the cancelled job")
    wait_until(lambda: not cluster.processes(f"SLURM_JOB_ID={job}"), "the end of its processes")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "3"
    said = Path(f"{run}.txt").read_text()
    assert said.count("[0] going on from ") == 3
    assert said.count(f"job {job} has stopped early and is queued again") == 2

    epochs = epochs_saved(run)
    uninterrupted = submit(cluster, straight, str(epochs))
    wait_until(lambda: cluster.ended(uninterrupted), "the uninterrupted job", seconds=240)
    said = Path(f"{straight}.txt").read_text()
    assert cluster.job(uninterrupted)["JobState"] == "COMPLETED", said
    for network in (0, 1):
        before, after = (checkpoint(path, epochs, network) for path in (straight, run))
        assert_same_bits(before["model"], after["model"])
        assert before["round"] == after["round"] == epochs
        assert metrics(straight, network)[-1]["graft"]["donor"] == 1 - network
        logs = straight / f"logs/{uninterrupted}-0/n{network + 1}"
        assert list(logs.glob("*/attempt_0/0/stdout.log"))
