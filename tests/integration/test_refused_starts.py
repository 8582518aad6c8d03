"""A start that rank 0 or one network refuses: all ranks end with the same line."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import (
    ERROR,
    end_population,
    error_line,
    program,
    run_population,
    run_program,
    torchrun,
)
from reading import contents

NETWORKS = 3
OPTIONS = (
    *("--epochs", "1", "--model.name", "resnet8", "--method", "none"),
    *("--optim.schedule", "constant", "--monitor.tensorboard", "false"),
)
OTHER = (*OPTIONS, "--seed", "7")
SAYS = "holds a run with a different configuration: seed was 0 and is now 7"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of three networks after one epoch."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_population(NETWORKS, run, *OPTIONS)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def refusals(run: Path, *options: str) -> list[str]:
    """Start three networks, and return the only line that each of them prints."""
    ends = end_population(NETWORKS, run, *options)
    for done in ends:
        assert done.errors.splitlines() == [ERROR + error_line(done)]
        assert not done.output
    return [error_line(done) for done in ends]


def assert_equal(lines: Sequence[str], *parts: str) -> None:
    """Assert that all ranks report the same error, which has these parts."""
    (text,) = {line.partition("): ")[2] for line in lines}
    assert all(part in text for part in parts), text
    assert all(f"(rank {rank} on " in line for rank, line in enumerate(lines))


def test_other_options_in_the_directory(run: Path) -> None:
    before = contents(run)
    assert_equal(refusals(run, *OTHER), f"{run} {SAYS}")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("networks", "says"),
    [
        ("[0,3]", "resume_networks names network 3, but"),
        ("[0,1,2,1]", "resume_networks names 4 networks, but 3 were started"),
        ("[2,1,0]", "resume_networks has nothing to train"),
    ],
)
def test_networks_that_cannot_be_resumed(run: Path, networks: str, says: str) -> None:
    before = contents(run)
    assert_equal(refusals(run, *OPTIONS, "--resume_networks", networks), says)
    assert contents(run) == before


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    assert_equal(refusals(file / "run", *OPTIONS), f"{file}/run/lease.json cannot be written")
    assert list(contents(tmp_path)) == ["file"]
    assert file.read_text() == "here"


@pytest.mark.slow
def test_checkpoints_that_are_damaged(run: Path) -> None:
    """Found by rank 0 only."""
    damaged = run / "checkpoints/epoch_0001/network02.pt"
    damaged.write_bytes(b"damaged")
    assert_equal(refusals(run, *OPTIONS, "--epochs", "2"), "no checkpoint in", str(damaged))
    assert damaged.read_bytes() == b"damaged"


@pytest.mark.slow
def test_one_network_had_another_optimizer(run: Path) -> None:
    """Found by the networks that continue; the third one is a copy, for which any will do."""
    members = '[{"optim.name": "adamw"}, {"optim.name": "adamw"}, {}]'
    options = (*OPTIONS, "--epochs", "2", "--members", members, "--resume_networks", "[0,1]")
    (text,) = {
        error_line(done).partition("): ")[2] for done in end_population(NETWORKS, run, *options)
    }
    assert text == (
        "resume_networks cannot continue a network that had another optimizer: pass its optim.name"
    )


@pytest.mark.slow
def test_torchrun_shows_the_same_line_of_every_rank(run: Path) -> None:
    done = run_program(torchrun(NETWORKS, run, *OTHER), timeout=150)
    assert done.status
    lines = [line for line in done.errors.splitlines() if line.startswith(ERROR)]
    assert_equal(sorted(lines), f"{run} {SAYS}")
    assert "TCPStore" not in done.errors


@pytest.mark.slow
def test_train_networks_prints_one_line(run: Path) -> None:
    command = [*program(run, *OTHER), "--networks", str(NETWORKS)]
    done = run_program(command, timeout=150)
    assert f"{run} {SAYS}" in error_line(done)
    assert done.errors.splitlines() == [ERROR + error_line(done)]
    assert not done.output
