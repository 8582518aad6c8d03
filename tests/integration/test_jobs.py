"""A population whose networks are separate jobs (graft.exchange files)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import (
    PROMPT_SECONDS,
    Train,
    end_population,
    error_line,
    program,
    running,
    wait_for_end,
    wait_until,
)
from reading import metrics, scalars, summary

from dist_graft import cli
from dist_graft.analysis.run_files import read_run
from dist_graft.analysis.status import facts, judge, status_text
from dist_graft.population.runtime.lease import Lease, this_process
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete, save_network

FILES = (
    *("--graft.exchange", "files", "--population.size", "3", "--model.name", "resnet8"),
    *("--epochs", "2", "--data.batch_size", "32", "--optim.lr_diversity", "cosine"),
)


def job(network: int | str) -> tuple[str, ...]:
    return (*FILES, "--population.network", str(network))


def status_of(path: Path) -> dict[str, Any]:
    run, now = read_run(path), time.time()
    content: dict[str, Any] = facts(run, judge(run, now), now)
    assert not content["problems"]
    content["text"] = status_text(run, judge(run, now), now)
    return content


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `two_jobs` keeps its run for the other tests."""
    return tmp_path_factory.mktemp("jobs") / "run"


@pytest.fixture
def two_jobs(template: Path, tmp_path: Path, train: Train) -> Path:
    """Run directory in which networks 0 and 2 of three have trained, one after the other."""
    if not template.exists():
        for network in (0, 2):
            assert train(template, *job(network)).status == 0
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def test_networks_train_one_after_the_other(two_jobs: Path) -> None:
    first, second = metrics(two_jobs, 0), metrics(two_jobs, 2)
    assert [line["graft"]["donor"] for line in first] == [None, None]  # it was alone
    assert {value for line in first for value in line["graft"]["coefficient"].values()} == {1.0}
    assert [line["graft"]["donor"] for line in second] == [0, 0]
    # Networks 0 and 1 of three are not there, so the ring closes over 0 and 2.
    assert [line["graft"]["lag"] for line in second] == [-1, 0]
    assert [line["graft"]["donor_epoch"] for line in second] == [2, 2]
    assert second[1]["graft"]["lags"] == {"0": 0}
    assert len(second[1]["graft"]["digest"]) == 64
    assert scalars(two_jobs / "network02")["round/lag"] == {0: -1.0, 1: 0.0}
    assert not (two_jobs / "summary.json").exists()
    assert not (two_jobs / "checkpoints").exists()
    assert not (two_jobs / "population").exists()


def test_status_of_jobs(two_jobs: Path) -> None:
    seen = status_of(two_jobs)
    assert [row["presence"] for row in seen["networks"]] == ["finished", "not started", "finished"]
    assert [row["lag"] for row in seen["networks"]] == [None, None, 0]
    assert [row["checkpoint"] for row in seen["networks"]] == ["epoch_0002", None, "epoch_0002"]
    assert "networks 0, 2 finished; network 1 not started" in seen["words"]
    assert "1: no donor" in seen["text"]
    lease = Lease(RunDirectory(two_jobs, job=1).lease, holder={"job": "77_1"})
    lease.acquire()
    try:
        row = status_of(two_jobs)["networks"][1]
    finally:
        lease.release()
    assert row["job"] == "77_1"
    assert row["lease"].startswith("held")


def test_the_last_job_writes_the_summary(two_jobs: Path, train: Train) -> None:
    done = train(two_jobs, *job("auto"))
    assert done.status == 0, done
    found = summary(two_jobs)
    assert [row["network"] for row in found["networks"]] == [0, 1, 2]
    for network, row in enumerate(found["networks"]):
        last = metrics(two_jobs, network)[-1]
        assert row["accuracy_before_last_round"] == last["test_accuracy"]
    assert status_of(two_jobs)["state"] == "finished"
    assert cli.run(["evaluate", str(two_jobs), "--batch_norm_batches", "1"]) == 0
    evaluated = json.loads((two_jobs / "evaluation.json").read_text())
    for one, other in zip(evaluated["members"], found["networks"], strict=True):
        assert one["test_accuracy"] == other["accuracy_after_last_round"]
    assert evaluated["ensemble_test_accuracy"] == found["ensemble_accuracy_after_last_round"]

    again = train(two_jobs, *job("auto"))
    assert again.status == 0, again
    assert "is complete: 2 epochs" in again.output

    # Summaries of fewer epochs do not count.
    shorter = json.loads((two_jobs / "network00" / "summary.json").read_text()) | {"epochs": 1}
    (two_jobs / "network00" / "summary.json").write_text(json.dumps(shorter))
    (two_jobs / "summary.json").unlink()
    assert train(two_jobs, *job(1)).status == 0
    assert not (two_jobs / "summary.json").exists()


def test_a_job_that_no_other_one_can_heal_keeps_its_last_finite_checkpoint(
    tmp_path: Path, train: Train
) -> None:
    run = tmp_path / "run"
    options = (*job(0), "--optim.schedule", "constant")
    assert train(run, *options, "--epochs", "1").status == 0
    (before,) = (run / "network00/checkpoints").iterdir()
    content = torch.load(before / "network00.pt", weights_only=True)
    content["model"]["conv1.weight"][:] = 1e30  # diverges in the next step
    digest = save_network(before / "network00.pt", content)
    mark_complete(before, epoch=1, round_=content["round"], sha256=[digest])
    done = train(run, *options, "--epochs", "3")
    error_line(done, "epoch 2: network 0 has ")
    assert [path.name for path in (run / "network00/checkpoints").iterdir()] == [before.name]
    assert "no network could heal it" in (run / "network00/log.txt").read_text()


def test_commands_use_whatever_is_there(two_jobs: Path, tmp_path: Path) -> None:
    shutil.rmtree(two_jobs / "network02" / "checkpoints" / "epoch_0002")
    assert cli.run(["evaluate", str(two_jobs), "--batch_norm_batches", "1"]) == 0
    evaluated = json.loads((two_jobs / "evaluation.json").read_text())
    assert [(row["network"], row["epoch"]) for row in evaluated["members"]] == [(0, 2), (2, 1)]
    assert evaluated["members"][1]["lr"] == pytest.approx(0.1)
    assert cli.run(["export", str(two_jobs), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").glob("*.pt")}
    assert names == {"network00.pt", "network02.pt", "uniform_soup.pt"}
    teacher = two_jobs / "network02" / "checkpoints" / "epoch_0001" / "network02.pt"
    assert cli.run(["inspect", str(teacher), "--out", str(tmp_path / "inspected")]) == 0


def test_a_network_is_trained_by_one_job(two_jobs: Path, train: Train) -> None:
    lease = Lease(RunDirectory(two_jobs, job=1).lease, holder={"job": "4711"})
    lease.acquire()
    try:
        line = error_line(train(two_jobs, *job(1)), "network 1:", "is in use by", "4711")
        assert not (two_jobs / "network01" / "log.txt").exists()
        error_line(
            train(two_jobs, *job("auto")), "2 of 3 networks have finished", "nothing is left"
        )
    finally:
        lease.release()
    assert str(os.getpid()) in line
    assert train(two_jobs, *job(1)).status == 0
    assert not RunDirectory(two_jobs, job=1).lease.exists()


def test_all_replicas_of_a_refused_job_name_the_holder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lease = Lease(RunDirectory(run, job=1).lease, holder=this_process())
    lease.acquire()
    ends = end_population(2, run, *job(1), "--runtime.replicas", "2", limit=PROMPT_SECONDS + 10)
    lease.release()
    for done in ends:
        error_line(done, f"is in use by process {os.getpid()} on ")
    assert not list(run.glob("network01/*"))


def test_an_ensemble_without_a_networks_weights_is_a_warning(two_jobs: Path, train: Train) -> None:
    for path in two_jobs.glob("network00/checkpoints/*/network00.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    done = train(two_jobs, *job(1))
    assert done.status == 0, done
    assert "no ensemble: " in done.output
    found = summary(two_jobs)
    assert [row["network"] for row in found["networks"]] == [0, 1, 2]
    assert not any("ensemble" in name for name in found)


def test_a_job_that_lost_its_lease_ends_without_writing(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(Lease, "lost", property(lambda lease: True))
    error_line(train(run, *job(1)), "was taken over by another run", "nothing more was written")
    assert not (run / "exchange").exists()
    assert not (run / "network01" / "checkpoints").exists()
    assert not (run / "network01" / "metrics.jsonl").exists()


def test_a_late_job_joins_with_the_donors_weights_and_epoch(two_jobs: Path, train: Train) -> None:
    done = train(two_jobs, *job(1), "--population.join", "donor")
    assert done.status == 0, done
    (line,) = metrics(two_jobs, 1)
    assert "joined with the weights of network" in done.output
    assert (line["epoch"], line["graft"]["round"]) == (1, 1)
    assert line["lr"] == pytest.approx(0.075 * 0.5)  # cosine over networks and over epochs


def test_jobs_must_agree_on_the_configuration(two_jobs: Path, train: Train) -> None:
    with_seed = train(two_jobs, *job(1), "--seed", "9")
    error_line(with_seed, "seed was 0 and is now 9")
    error_line(
        train(two_jobs, "--epochs", "2", "--model.name", "resnet8", "--data.batch_size", "32"),
        "holds a run of 3 networks",
    )
    assert train(two_jobs, *job(1), "--graft.wait_seconds", "0.1").status == 0


def test_the_population_may_grow(two_jobs: Path, train: Train) -> None:
    larger = (*FILES, "--population.size", "4", "--population.network", "3")
    assert train(two_jobs, *larger).status == 0
    assert yaml.safe_load((two_jobs / "config.yaml").read_text())["run"]["networks"] == 4
    assert metrics(two_jobs, 3)[-1]["graft"]["donor"] == 2
    error_line(train(two_jobs, *job(1)), "a population of 4 networks", "--population.size 4")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--graft.exchange", "files"), ("requires population.size",)),
        ((*FILES, "--method", "wash"), ("method wash", "same step", "all_gather or p2p")),
        (("--population.size", "2"), ("section population require graft.exchange files",)),
        (("--graft.max_lag", "1"), ("require graft.exchange files",)),
        (job(3), ("population.network must be in 0 to 2", "3")),
        ((*FILES, "--graft.wait_seconds", "-1"), ("graft.wait_seconds must be at least 0",)),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, train: Train, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    error_line(train(tmp_path / "run", *options), *parts)


def test_a_task_outside_of_the_population(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    done = train(tmp_path / "run", *FILES)
    error_line(done, "task 3 of an array", "number the tasks from 0 to 2")


def test_a_full_exchange_folder_is_a_warning(tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "exchange").write_text("a file where the folder should be")
    done = train(run, *job(0))
    assert done.status == 0, done
    assert "cannot be written" in done.output
    assert len(metrics(run, 0)) == 2


@pytest.mark.slow
def test_stop_files_reach_the_jobs_that_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = (*FILES, "--epochs", "500", "--optim.schedule", "constant")
    commands = [program(run, *long, "--population.network", str(k)) for k in range(2)]

    def trains(network: int) -> Callable[[], bool]:
        path = RunDirectory(run).metrics(network)
        return lambda: path.exists() and bool(metrics(run, network))

    with running([commands[0]]) as (zero,), running([commands[1]]) as (one,):
        for network in range(2):
            wait_until(trains(network), f"an epoch of network {network}", meanwhile=[zero, one])
        (run / "network01" / "STOP").touch()
        assert wait_for_end(one, 60).status == 75
        assert (run / "network01" / "STOPPED_EARLY").exists()
        before = len(metrics(run, 0))
        wait_until(lambda: len(metrics(run, 0)) > before + 1, "the other job to continue")
        seen = status_of(run)
        assert [row["presence"] for row in seen["networks"]] == ["running", "left", "not started"]
        (run / "STOP").touch()
        assert wait_for_end(zero, 60).status == 75
    finished = len(metrics(run, 1))
    with running([commands[1]]) as (one,):  # the older RUN/STOP does not concern it
        wait_until(lambda: len(metrics(run, 1)) > finished, "an epoch after it", meanwhile=[one])
        os.kill(one.pid, signal.SIGTERM)
        assert wait_for_end(one, 60).status == 75
