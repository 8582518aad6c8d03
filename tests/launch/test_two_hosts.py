"""launch/multinode.sh on two hosts (network namespaces)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hosts
import pytest
from launching import (
    Done,
    checkpoint_is_complete,
    environment,
    error_line,
    wait_for_end,
    wait_until,
)
from reading import metrics

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "64", "--data.test_samples", "40"),
    *("--data.batch_size", "32", "--optim.schedule", "constant"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--runtime.timeout_seconds", "15"),
)


@pytest.fixture
def pair() -> Iterator[hosts.TwoHosts]:
    hosts.need_hosts()
    with hosts.two_hosts() as two:
        yield two


@contextmanager
def started(
    pair: hosts.TwoHosts, runs: tuple[Path, Path], *options: str, **settings: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run the script on both hosts; killed on exit."""
    launchers = [
        subprocess.Popen(
            pair.on(host, [str(ROOT / "launch/multinode.sh"), *SMALL, *options]),
            env=environment(
                **{"HEAD": hosts.NAMES[0], "NODES": "2", "PROCESSES": "1", "JOIN_TIMEOUT": "60"},
                **{"RUN_DIR": str(run), "PYTHON": sys.executable},
            )
            | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, run in enumerate(runs)
    ]
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.kill()  # the kernel then kills its processes
        for launcher in launchers:
            launcher.communicate()


def error_of(done: Done) -> str:
    """The first error line on the console, without the prefix of the rank."""
    lines = [line for line in done.errors.splitlines() if "dist-graft: error: " in line]
    assert lines, done
    return lines[0].partition("dist-graft: error: ")[2]


@pytest.mark.slow
def test_a_cut_cable_ends_the_job_on_both_hosts(pair: hosts.TwoHosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(pair, (run, run), "--epochs", "100000") as launchers:
        wait_until(checkpoint_is_complete(run, 2), "the second epoch", meanwhile=launchers)
        pair.cut()
        ends = [wait_for_end(launcher, 90) for launcher in launchers]
    assert [metrics(run, network)[0]["graft"]["donor"] for network in (0, 1)] == [1, 0]
    for network, (name, done) in enumerate(zip(hosts.NAMES, ends, strict=True)):
        assert done.status == 1
        line = error_of(done)
        assert line.startswith(f"network {network} (rank {network} on {name}): ")
        assert "did not respond" in line
        assert line in (run / f"network{network:02d}/log.txt").read_text()
    assert not (run / "summary.json").exists()
    log = [line.split() for line in (run / "network00/log.txt").read_text().splitlines()]
    header = ["network", "rank", "host", "device"]
    above = next(number for number, words in enumerate(log) if words[-4:] == header)
    assert log[above + 1 : above + 3] == [
        ["0", "0", "alpha", "cpu"],
        ["1", "1", "beta", "cpu"],
    ]


@pytest.mark.slow
def test_an_address_without_a_host(pair: hosts.TwoHosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(pair, (run, run), HEAD="10.77.0.9", JOIN_TIMEOUT="5") as launchers:
        ends = [wait_for_end(launcher, 90) for launcher in launchers]
    for name, done in zip(hosts.NAMES, ends, strict=True):
        assert done.status == 1
        line = error_line(
            done, f"{name} could not connect to the other machines at 10.77.0.9:29500 within 5 s"
        )
        assert "HEAD must be the name of one of them" in line


@pytest.mark.slow
def test_a_separate_disk_on_each_host(pair: hosts.TwoHosts, tmp_path: Path) -> None:
    with started(pair, (tmp_path / "one", tmp_path / "other")) as launchers:
        ends = [wait_for_end(launcher, 90) for launcher in launchers]
    for done in ends:
        assert done.status == 1
        assert "is not shared by all processes: network 1 on beta did not see" in error_of(done)
