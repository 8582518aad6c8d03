"""The unmodified launch/slurm.sbatch on a Slurm cluster of two nodes on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from launching import checkpoint_is_complete, wait_until
from reading import assert_same_bits, checkpoint, metrics

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/slurm.sbatch")
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "256", "--data.test_samples", "40"),
    *("--data.batch_size", "32", "--optim.schedule", "constant", "--seed", "3"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--checkpoint.keep", "1000"),
)
ENDLESS = "100000"
LIMIT = 150
"""Timeout of an action that takes Slurm up to 30 s, while another run starts."""


def submit(cluster: slurm.Slurm, run: Path, epochs: str, *options: str, **settings: str) -> str:
    """Submit the script with the site's settings as variables and options."""
    return cluster.submit(
        [SCRIPT, "--epochs", epochs, *SMALL],
        *("--cpus-per-task=2", f"--chdir={ROOT}", f"--output={run}.txt", *options),
        **{"RUN_DIR": str(run), "HEAD": "127.0.0.1", "PYTHON": sys.executable} | settings,
    )


def epochs_saved(run: Path) -> int:
    """Number of epochs of the latest checkpoint at the end of an epoch."""
    done = [int(path.parent.name[6:]) for path in run.glob("checkpoints/epoch_????/COMPLETE.json")]
    return max(done, default=0)


def end(cluster: slurm.Slurm, job: str) -> None:
    """Cancel a job and check that all of its processes have ended."""
    cluster.command("scancel", job)
    wait_until(lambda: cluster.ended(job), "the end of the cancelled job", seconds=LIMIT)
    wait_until(lambda: not cluster.processes(f"SLURM_JOB_ID={job}"), "the end of its processes")
    assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.fixture
def cluster() -> Iterator[slurm.Slurm]:
    slurm.need_slurm()
    with slurm.two_nodes() as two:
        yield two


@pytest.mark.slow
def test_cores_follow_gpus(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """Jobs whose training is the program true."""
    for options, cores, warning in (
        ((), "4", ""),
        (("--cpus-per-task=2",), "2", ""),
        (("--gpus-per-node=2", "--cpus-per-gpu=3"), "6", ""),
        (("--gpus-per-node=2", "--cpus-per-task=3"), "3", "2 GPUs and 3 cores on n1: ask"),
    ):
        output = tmp_path / "job.txt"
        output.unlink(missing_ok=True)
        job = cluster.submit(
            [SCRIPT],
            *("--wait", f"--chdir={ROOT}", f"--output={output}", *options),
            PYTHON="true",
            RUN_DIR=str(tmp_path / "run"),
        )
        assert cluster.job(job)["NumCPUs"] == cores
        assert warning in output.read_text()
        assert bool(warning) == ("warning" in output.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_survives_preemption_a_lost_node_and_its_time_limit(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """Its weights equal those of an uninterrupted job."""
    run, straight, urgent = (tmp_path / name for name in ("run", "straight", "urgent"))
    job = submit(cluster, run, ENDLESS, "--nodes=2")
    undisturbed = submit(
        cluster, straight, ENDLESS, "--partition=high", "--nodelist=n1", PROCESSES="2"
    )

    def trains_again(restarts: int) -> None:
        # Not by checkpoints alone: the processes of a requeued job may still save one.
        wait_until(
            lambda: (
                int(cluster.job(job)["Restarts"]) == restarts
                and cluster.job(job)["JobState"] == "RUNNING"
                and Path(f"{run}.txt").read_text().count("[0] resumed from ") == restarts
            ),
            f"resuming after {restarts} interruptions",
            seconds=LIMIT,
        )
        before = epochs_saved(run)
        wait_until(
            lambda: epochs_saved(run) > before,
            f"training after {restarts} interruptions",
            seconds=LIMIT,
        )

    wait_until(checkpoint_is_complete(run, 1), "the first epoch", seconds=LIMIT)
    more_urgent = submit(cluster, urgent, "1", "--nodes=2", "--partition=high", "--cpus-per-task=4")
    wait_until((run / "STOPPED_EARLY").exists, "the stop for a more urgent job", seconds=LIMIT)
    wait_until(lambda: cluster.ended(more_urgent), "the end of that one", seconds=LIMIT)
    output = Path(f"{urgent}.txt").read_text()
    assert cluster.job(more_urgent)["JobState"] == "COMPLETED", output
    for network in (0, 1):
        assert metrics(urgent, network)[0]["graft"]["donor"] == 1 - network
        logs = urgent / f"logs/{more_urgent}-0/n{network + 1}"
        assert list(logs.glob("*/attempt_0/0/stdout.log"))
    trains_again(1)

    cluster.kill_node("n2")
    wait_until(
        lambda: cluster.job(job)["JobState"] != "RUNNING", "the loss of a node", seconds=LIMIT
    )
    cluster.start_node("n2")
    trains_again(2)

    # Slurm looks every 30 s, for jobs that are within 30 s of the script's 120.
    cluster.command("scontrol", "update", f"JobId={job}", "EndTime=now+150")
    wait_until((run / "STOPPED_EARLY").exists, "the stop before the time limit", seconds=LIMIT)
    trains_again(3)
    end(cluster, job)
    assert cluster.job(job)["Restarts"] == "3"
    output = Path(f"{run}.txt").read_text()
    assert output.count("[0] resumed from ") == 3
    assert output.count(f"job {job} stopped early and is requeued") == 2

    epochs = epochs_saved(run)
    last = straight / "checkpoints" / f"epoch_{epochs:04d}"
    wait_until((last / "COMPLETE.json").exists, "as many epochs at a stretch", seconds=LIMIT)
    end(cluster, undisturbed)
    assert cluster.job(undisturbed)["Restarts"] == "0"
    for network in (0, 1):
        before, after = (checkpoint(path, epochs, network) for path in (straight, run))
        assert_same_bits(before["model"], after["model"])
        assert before["round"] == after["round"] == epochs
