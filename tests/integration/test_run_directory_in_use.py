"""One run at a time in a run directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from launching import (
    ERROR,
    PROMPT_SECONDS,
    Train,
    end_population,
    error_line,
    program,
    running,
    wait_until,
)
from reading import contents

from dist_graft.population.runtime.lease import Lease, this_process

SHORT = ("--epochs", "1", "--monitor.tensorboard", "false")


@pytest.fixture
def other_run(tmp_path: Path) -> Lease:
    lease = Lease(tmp_path / "run/lease.json", holder=this_process())
    lease.acquire()
    return lease


def test_a_second_launch_is_refused_and_names_the_first(tmp_path: Path, train: Train) -> None:
    run, endless = tmp_path / "run", ("--epochs", "100000", "--checkpoint.every", "0")
    with running([program(run, *SHORT, *endless)]) as (first,):
        log = run / "network00/log.txt"
        wait_until(lambda: log.exists() and "epoch" in log.read_text(), "the first run")
        line = error_line(train(run, *SHORT), f"{run} is in use by process {first.pid} on ")
        assert socket.gethostname() in line
        assert "wait until it ends" in line
        assert first.poll() is None
        assert "in use" not in log.read_text()
        first.kill()
        first.communicate()
    assert train(run, *SHORT, *endless, "--resume", "must").status == 1  # no checkpoint
    (run / "config.yaml").unlink()
    assert train(run, *SHORT).status == 0
    assert not (run / "lease.json").exists()


@pytest.mark.usefixtures("other_run")
def test_all_ranks_of_a_refused_run_exit_and_write_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends = end_population(2, run, *SHORT, limit=PROMPT_SECONDS + 10)
    for rank, done in enumerate(ends):
        assert done.status == 1
        assert f"{run} is in use by process {os.getpid()} on " in error_line(done)
        assert f"(rank {rank} on " in done.errors
        assert done.errors.count(ERROR) == 1
    assert list(contents(run)) == ["lease.json"]


def test_an_abandoned_lease_is_taken_over(tmp_path: Path, train: Train, other_run: Lease) -> None:
    run = tmp_path / "run"
    os.utime(run / "lease.json", (0, 0))
    assert train(run, *SHORT).status == 0
    assert other_run.lost or not (run / "lease.json").exists()
