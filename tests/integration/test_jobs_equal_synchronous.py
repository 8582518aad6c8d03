"""Jobs that share only a directory (max_lag 0) give the weights of networks that run together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Done, program, run_population, run_program
from reading import assert_same_bits, metrics, optimizer_tensors, summary

TINY = (
    *("--model.name", "resnet8", "--data.batch_size", "16", "--epochs", "3", "--seed", "4"),
    *("--optim.lr_diversity", "cosine", "--monitor.tensorboard", "false"),
)
IN_STEP = ("--graft.exchange", "files", "--graft.max_lag", "0", "--graft.wait_seconds", "inf")
STEPS_PER_EPOCH = 4
STOPPED_EARLY = 75
METHODS = {
    "graft": (),
    "average": ("--method", "average"),
    "papa": ("--method", "papa", "--papa.every_steps", "3", "--papa.beta", "0.7"),
    "qsr": ("--graft.every_steps", "3", "--graft.qsr_alpha", "0.16"),  # after 3, 6, 10, 12 steps
}


def run_job(run: Path, network: int, *options: str, **more: str) -> Done:
    """Run the job of one network, numbered as a task of a Slurm array."""
    tests = Path(__file__).parents[1]
    place = {"SLURM_ARRAY_TASK_ID": str(network), "PYTHONPATH": str(tests), **more}
    return run_program(program(run, *options), timeout=150, **place)


def run_jobs(
    run: Path, networks: int, *options: str, ends: dict[int, list[str]] | None = None
) -> list[list[Done]]:
    """Run one job for each network at the same time.

    Args:
        run: run directory.
        networks: size of the population.
        options: of every job.
        ends: by network, where its job ends and is started again (dying.py).
    """

    def lives(network: int) -> list[Done]:
        places = [*(ends or {}).get(network, ()), ""]
        own = (*options, "--population.size", str(networks), "--callbacks", "dying:EndAtStep")
        return [run_job(run, network, *own, END_AT=place) for place in places]

    with ThreadPoolExecutor(networks) as pool:
        return list(pool.map(lives, range(networks)))


def job_checkpoint(run: Path, epoch: int, network: int) -> dict[str, Any]:
    name = f"network{network:02d}"
    path = run / name / "checkpoints" / f"epoch_{epoch:04d}" / f"{name}.pt"
    return torch.load(path, weights_only=True)


def assert_equal_runs(together: Path, jobs: Path, networks: int) -> None:
    """Assert that the final state, the rounds and the summary are the same."""
    for network in range(networks):
        name = f"network{network:02d}.pt"
        synchronous = torch.load(together / "checkpoints" / "epoch_0003" / name, weights_only=True)
        job = job_checkpoint(jobs, 3, network)
        assert_same_bits(synchronous["model"], job["model"])
        assert_same_bits(optimizer_tensors(synchronous), optimizer_tensors(job))
        for one, other in zip(metrics(together, network), metrics(jobs, network), strict=True):
            for name in ("round", "donor", "coefficient", "information"):
                assert one["graft"][name] == other["graft"][name]
            for name in ("train_loss", "test_loss", "test_accuracy"):
                assert one[name] == other[name]
            assert other["graft"]["lag"] == 0
    assert without_seconds(summary(together)) == without_seconds(summary(jobs))


def without_seconds(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in set(content) - {"wall_seconds", "events"}}


@pytest.mark.parametrize(
    ("networks", "method", "ends"),
    [
        pytest.param(3, "graft", {1: ["7:kill"]}, id="graft-3-killed"),
        pytest.param(2, "qsr", {0: ["7:kill"]}, id="qsr-2-killed", marks=pytest.mark.slow),
        pytest.param(
            4,
            "average",
            {0: ["6:stop", "9:kill"], 2: ["10:kill"]},
            id="average-4-killed-stopped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3, "papa", {1: ["5:stop", "8:kill"]}, id="papa-3-stopped", marks=pytest.mark.slow
        ),
    ],
)
def test_jobs_in_step_equal_networks_that_run_together(
    tmp_path: Path, networks: int, method: str, ends: dict[int, list[str]]
) -> None:
    options = (*TINY, *METHODS[method])
    run_population(networks, tmp_path / "together", *options)
    lives = run_jobs(tmp_path / "jobs", networks, *options, *IN_STEP, ends=ends)
    for network, dones in enumerate(lives):
        wanted = [-9 if e.endswith("kill") else STOPPED_EARLY for e in ends.get(network, ())]
        assert [done.status for done in dones] == [*wanted, 0], dones
    assert_equal_runs(tmp_path / "together", tmp_path / "jobs", networks)
