"""Errors that need several processes: each reports its cause, and all exit promptly."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
from image_folders import write_images
from launching import (
    PROMPT_SECONDS,
    checkpoint_is_complete,
    children,
    error_line,
    free_port,
    is_alive,
    program,
    run_program,
    run_programs,
    running,
    torchrun,
    wait_for_end,
    wait_until,
)
from reading import contents, events, summary

LONG = ("--epochs", "400")
SHORT = ("--epochs", "1")


def test_non_finite_weights(tmp_path: Path) -> None:
    """Every process reports them, in its log too, and torchrun's table of failures has the line."""
    run = tmp_path / "run"
    with running([torchrun(2, run, *SHORT, "--optim.lr", "1e30")]) as (launcher,):
        log = run / "network01/log.txt"
        wait_until(lambda: log.is_file() and "resnet20" in log.read_text(), "the start")
        done = wait_for_end(launcher, PROMPT_SECONDS)
    line = error_line(done, "epoch 0", "network 0 has a weight", "network 1 has a weight")
    assert re.search(r"not finite in \S+\.(weight|bias|running_var|running_mean)", line)
    table = done.errors[done.errors.index("FAILED") :]
    assert "has a weight that is not finite" in table
    logs = [(run / f"network{k:02d}/log.txt").read_text() for k in (0, 1)]
    assert any("ERROR" in log and "not finite" in log for log in logs)
    assert not (run / "checkpoints").exists()
    assert not (run / "summary.json").exists()


def test_a_network_that_diverges_after_the_last_round_is_reported(tmp_path: Path) -> None:
    """The round after the first epoch heals it; none follows the second."""
    options = ("--epochs", "3", "--graft.stop", "1", "--optim.lrs", "[0.05,1e30]")
    run = tmp_path / "run"
    ends = run_programs([program(run, *options)] * 2, timeout=PROMPT_SECONDS)
    assert [done.status for done in ends] == [0, 0]
    found = [(event["kind"], event["epoch"], event["network"]) for event in events(run)]
    assert found == [("healed", 0, 1), ("diverged", 1, 1)]
    text = "network 1 is not finite, and no round follows to heal it"
    assert text in (run / "network00/log.txt").read_text()
    assert summary(run)["diverged"] == [1]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("topology own_components:own_donors", "ValueError: network 0 of 2 is its own donor"),
        ("criterion own_components:no_criterion", "ZeroDivisionError: 10 bins"),
        ("criterion own_components:unknown_criterion", "ValueError: "),
    ],
)
def test_functions_of_a_round_that_fail_are_named(option: str, says: str, tmp_path: Path) -> None:
    options = (*SHORT, *f"--graft.{option}".split())
    ends = run_programs([program(tmp_path / "run", *options)] * 2, timeout=PROMPT_SECONDS)
    for done in ends:
        error_line(done, f"{option} failed: {says}")


def test_data_of_different_lengths(tmp_path: Path) -> None:
    roots = [write_images(tmp_path / str(count), "a", "b", count=count) for count in (4, 5)]
    options = ("--data.name", "imagefolder", "--data.image_size", "16", "--data.batch_size", "8")
    run = tmp_path / "run"
    ends = run_programs(
        [program(run, *SHORT, *options, "--data.root", str(root)) for root in roots],
        timeout=PROMPT_SECONDS,
    )
    for done in ends:
        error_line(done, "an epoch has different numbers of steps on different ranks ([1, 2])")


def test_data_that_one_machine_lacks(tmp_path: Path) -> None:
    roots = [write_images(tmp_path / "data", "a", "b"), tmp_path / "nothing"]
    options = ("--data.name", "imagefolder", "--data.image_size", "16")
    run = tmp_path / "run"
    ends = run_programs(
        [program(run, *SHORT, *options, "--data.root", str(root)) for root in roots],
        timeout=PROMPT_SECONDS,
    )
    for done in ends:
        error_line(done, f"{tmp_path}/nothing/train is missing")


def test_a_run_without_a_round_says_so(tmp_path: Path) -> None:
    options = (*SHORT, "--graft.start", "5")
    ends = run_programs([program(tmp_path / "run", *options)] * 2, timeout=PROMPT_SECONDS)
    assert [done.status for done in ends] == [0, 0]
    logs = [(tmp_path / f"run/network{k:02d}/log.txt").read_text() for k in (0, 1)]
    text = "no round takes place before the run ends, after 2 steps"
    assert [text in log for log in logs] == [True, False]


@pytest.mark.slow
def test_run_directory_that_is_not_shared(tmp_path: Path) -> None:
    """As on two machines with separate disks: nothing remains."""
    runs = [tmp_path / "one", tmp_path / "other"]
    ends = run_programs([program(run, *SHORT) for run in runs], timeout=60)
    for run, done in zip(runs, ends, strict=True):
        line = error_line(
            done, f"{run} is not shared by all processes", "on a disk that all machines mount"
        )
        assert f": network 1 on {socket.gethostname()} did not see" in line
        assert not contents(run)


def test_different_architectures(tmp_path: Path) -> None:
    """Detected before the first epoch."""
    run = tmp_path / "run"
    names = ("resnet20", "resnet32")
    ends = run_programs([program(run, *LONG, "--model.name", name) for name in names], timeout=60)
    for done in ends:
        error_line(done, "model.name is 'resnet20' in network 0", "'resnet32' in")
    assert not contents(run)


def test_dead_peer_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([program(run, *LONG)] * 2) as processes:
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=processes)
        processes[1].kill()
        done = wait_for_end(processes[0], PROMPT_SECONDS)
    error_line(done, "network 0", "network 1 (rank 1 on ", log=run / "network00/log.txt")
    assert list(run.glob("checkpoints/*/COMPLETE.json"))
    assert not (run / "summary.json").exists()


def test_dead_peer_under_torchrun_is_named_by_survivor_and_table(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([torchrun(2, run, *LONG)]) as (launcher,):
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=[launcher])
        first, second = children(launcher)
        os.kill(second, signal.SIGKILL)
        done = wait_for_end(launcher, PROMPT_SECONDS)
    error_line(done, "network 1 (rank 1 on ")
    table = done.errors[done.errors.index("FAILED") :]
    assert re.search(r"rank +: 1", table)
    assert not is_alive(first)


@pytest.mark.parametrize(
    ("stopped", "timeout", "parts"),
    [
        (1, 8, ["network 1 (rank 1 on "]),
        # The first network hosts the store, which each network polls for stop requests.
        pytest.param(0, 5, ["network 1 (rank 1 on ", "did not respond"], marks=pytest.mark.slow),
    ],
)
def test_stopped_peer_does_not_block_the_other_network(
    tmp_path: Path, stopped: int, timeout: int, parts: list[str]
) -> None:
    run, other = tmp_path / "run", 1 - stopped
    options = (*LONG, "--runtime.timeout_seconds", str(timeout))
    with running([program(run, *options)] * 2) as processes:
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=processes)
        processes[stopped].send_signal(signal.SIGSTOP)
        done = wait_for_end(processes[other], 60 if stopped == 0 else PROMPT_SECONDS)
    error_line(done, *parts, log=run / f"network{other:02d}/log.txt")


def rendezvous(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}  # fmt: skip


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_peer_that_never_starts(tmp_path: Path, rank: int, missing: int) -> None:
    command = program(tmp_path / "run", *SHORT, "--runtime.timeout_seconds", "3")
    port = free_port()
    done = run_program(command, timeout=PROMPT_SECONDS, **rendezvous(rank, port))
    line = error_line(done, f"network {rank} (rank {rank} on ", "MASTER_PORT")
    assert f"network {missing}" in line or str(port) in line


@pytest.mark.parametrize("rank", [0, 1])
def test_port_in_use(tmp_path: Path, rank: int) -> None:
    command = program(tmp_path / "run", *SHORT, "--runtime.timeout_seconds", "3")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run_program(command, timeout=PROMPT_SECONDS, **rendezvous(rank, port))
    error_line(done, f"port {port} of 127.0.0.1", "choose a free MASTER_PORT")
    assert not contents(tmp_path / "run")
