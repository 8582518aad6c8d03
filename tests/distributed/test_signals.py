"""A process that is asked to stop ends within the grace period, whatever its peers do.

Network 1 is stopped (SIGSTOP), so that network 0 waits for it, and network 0 gets the signal.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from launching import BLOCKING, by_hand, program, running, wait_for_end, wait_until

GRACE = 3
LIMIT = 60
"""Seconds for the end of a process on a busy machine; it would wait ten minutes for its peer."""
OPTIONS = ("--epochs", "400", "--checkpoint.grace_seconds", str(GRACE), "--data.workers", "0")


def ends_in_time(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal, and return the errors of a process that must end within the grace period."""
    process.send_signal(number)
    done = wait_for_end(process, LIMIT)
    assert done.status in (1, 143), done
    return done.errors


def blocking(phase: str, run: Path, *options: str) -> list[str]:
    """Command of a process that trains until network 1 stops itself in a phase of the run."""
    return [sys.executable, BLOCKING, phase, *program(run, *OPTIONS, *options)[3:]]


@pytest.mark.parametrize(
    "phase",
    [
        "round",
        *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("step", "evaluate", "save")),
    ],
)
def test_a_process_that_waits_for_a_stopped_peer(phase: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running([blocking(phase, run)] * 2) as (first, second):
        stopped = run / f"{phase}.stopped"
        wait_until(stopped.exists, f"the {phase}", meanwhile=[first, second])
        errors = ends_in_time(first, signal.SIGUSR1)
        assert "could not stop gracefully within 3 s" in errors
        assert second.poll() is None
        second.send_signal(signal.SIGCONT)
        assert wait_for_end(second, LIMIT).status == 1


def test_a_process_whose_peer_has_not_started(tmp_path: Path) -> None:
    first, _ = by_hand(2)
    with running([program(tmp_path / "run", *OPTIONS)], **first) as (process,):
        address = first["MASTER_ADDR"], int(first["MASTER_PORT"])
        wait_until(lambda: _is_open(*address), "the store", meanwhile=[process])
        assert "stopped by SIGTERM" in ends_in_time(process, signal.SIGTERM)


def test_a_process_that_waits_for_a_connection(tmp_path: Path) -> None:
    """The peer has registered; it does not take part in the creation of the process group."""
    first, _ = by_hand(2)
    host, port = first["MASTER_ADDR"], int(first["MASTER_PORT"])
    with running([program(tmp_path / "run", *OPTIONS)], **first) as (process,):
        wait_until(lambda: _is_open(host, port), "the store", meanwhile=[process])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
        keys = dist.PrefixStore("dist_graft", dist.PrefixStore("attempt_0/run_0", store))
        keys.set("process/1", str(os.getpid()))
        keys.set("the GPU/1", "")
        keys.set("host/1", socket.gethostname())
        keys.set("group/1", keys.get("group/0"))  # started with the same options
        # Four keys of each process, and the first of the process group.
        wait_until(lambda: keys.num_keys() > 8, "the process group", meanwhile=[process])
        errors = ends_in_time(process, signal.SIGINT)
    assert "stopped by SIGINT" in errors or "could not stop gracefully" in errors


def _is_open(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0
