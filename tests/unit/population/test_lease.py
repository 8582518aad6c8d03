from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_graft.errors import LeaseHeldError, RunDirectoryError
from dist_graft.population.runtime import lease as lease_module
from dist_graft.population.runtime.lease import (
    Lease,
    LeaseInfo,
    read_lease,
    sees_lease,
    this_process,
)

ME = this_process()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lease.json"


@contextlib.contextmanager
def held(path: Path, **settings: Any) -> Iterator[Lease]:
    lease = Lease(path, holder=ME, **settings)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def edit(path: Path, *, age: float = 0.0, **changes: Any) -> None:
    """Change entries of a lease file, and make its heartbeat older."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    os.utime(path, (time.time() - age, time.time() - age))


def abandoned(path: Path, *, age: float = 0.0, **changes: Any) -> None:
    """Write the lease of a holder that does not refresh it; by default on another machine."""
    with held(path):
        content = path.read_bytes()
    path.write_bytes(content)
    edit(path, age=age, **{"host": "elsewhere", "machine": "another", "token": "f00", **changes})


def read(path: Path) -> LeaseInfo:
    info = read_lease(path)
    assert info
    return info


def test_a_held_lease_refuses_others_and_names_its_holder(path: Path) -> None:
    with held(path) as lease:
        with pytest.raises(LeaseHeldError) as refused:
            Lease(path, holder=ME).acquire()
        assert str(path.parent) in str(refused.value)
        assert f"process {os.getpid()} on {ME['host']}" in str(refused.value)
        assert not lease.lost
        assert not read(path).expired
        assert read(path).pid == os.getpid()
    assert list(path.parent.iterdir()) == []
    assert read_lease(path) is None
    with held(path) as again:
        assert not again.lost


def test_a_process_sees_the_lease_with_its_token(path: Path) -> None:
    with held(path) as lease:
        assert sees_lease(path, lease.token, 60)
        assert not sees_lease(path, "another", 0)
    assert not sees_lease(path, lease.token, 0.3)


def test_the_job_of_a_batch_system_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert this_process()["job"] == "71"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with held(path), pytest.raises(LeaseHeldError, match="job 70_1"):
        Lease(path, holder=ME).acquire()


@pytest.mark.parametrize(
    ("changes", "expired"),
    [
        ({"age": 50}, False),
        ({"age": 70}, True),
        ({"age": 70, "expire_seconds": 100}, False),
        ({"age": 5, "expire_seconds": 4}, True),
        ({"pid": 1}, False),  # not a process of this machine
    ],
)
def test_another_machines_lease_expires_with_its_heartbeat(
    changes: dict[str, Any], expired: bool, path: Path
) -> None:
    abandoned(path, **changes)
    assert read(path).expired == expired
    lease = Lease(path, holder=ME)
    if expired:
        lease.acquire()
        assert read(path).host == ME["host"]
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        lease.release()
    else:
        with pytest.raises(LeaseHeldError, match="on elsewhere"):
            lease.acquire()


def test_the_lease_of_a_dead_process_is_taken_over_at_once(path: Path) -> None:
    code = (
        "import pathlib, sys; from dist_graft.population.runtime.lease import *;"
        "lease = Lease(pathlib.Path(sys.argv[1]), holder=this_process()); lease.acquire();"
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeldError, match=f"process {other.pid} "):
            Lease(path, holder=ME).acquire()
        other.kill()
    assert read(path).expired
    with held(path):
        assert read(path).pid == os.getpid()


def test_a_reused_process_id_does_not_hold_the_lease(path: Path) -> None:
    with held(path) as lease:
        assert not read(path).expired
        edit(path, process_start="1")
        assert read(path).expired
        assert not lease.lost


def test_a_holder_notices_that_it_was_replaced(path: Path) -> None:
    with held(path, expire_seconds=60) as stopped:
        edit(path, age=61)
        with held(path) as taker:
            assert stopped.lost
            assert not taker.lost
            stopped.release()
            assert not taker.lost
        assert stopped.lost
        assert read_lease(path) is None


def test_a_holder_notices_a_takeover_that_has_ended(path: Path) -> None:
    """Nothing on the disk tells of it: the holder knows only that it may have expired."""
    with held(path, expire_seconds=0.2) as stopped:
        stopped._released.set()  # ends the heartbeat, as SIGSTOP does
        deadline = time.monotonic() + 10
        while not read(path).expired:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with held(path, expire_seconds=60):
            pass
        stopped._released.clear()
        assert stopped.lost
    assert read_lease(path) is None


def test_a_holder_that_is_stopped_within_a_heartbeat_knows_that_it_may_have_expired(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(lease_module, "_now", lambda: now)
    with held(path, expire_seconds=60) as stopped:
        utime = os.utime

        def stop_after(file: Path) -> None:
            nonlocal now
            utime(file)
            now += 61

        monkeypatch.setattr(os, "utime", stop_after)
        stopped._refresh()
        assert stopped._may_have_expired
        assert not stopped.lost  # the file is still there


def test_a_holder_that_is_stopped_while_it_acquires_knows_that_it_may_have_expired(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, acquire = 1000.0, Lease._try_to_acquire

    def stop_after(lease: Lease) -> bool:
        nonlocal now
        acquired = acquire(lease)
        now += 61
        return acquired

    monkeypatch.setattr(lease_module, "_now", lambda: now)
    monkeypatch.setattr(Lease, "_try_to_acquire", stop_after)
    with held(path, expire_seconds=60) as stopped:
        assert stopped._may_have_expired


def test_a_deleted_lease_is_created_again(path: Path) -> None:
    with held(path, expire_seconds=4) as lease:
        shutil.rmtree(path.parent)
        assert not lease.lost
        deadline = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lease.lost


def test_a_process_that_died_during_a_takeover_leaves_nothing_to_remove(path: Path) -> None:
    abandoned(path, age=100, token="a")
    root = path.read_bytes()
    abandoned(path, token="b")
    edit(path, age=100)
    path.rename(path.with_name(f".{path.name}.a"))  # the successor, not yet renamed
    path.write_bytes(root)
    path.with_name(f".{path.name}.c.new").touch()
    for file in (path, path.with_name(f".{path.name}.c.new")):
        os.utime(file, (0, 0))
    assert read(path).token == "b"
    with held(path) as lease:
        assert not lease.lost
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    abandoned(path, age=100)
    with held(path) as lease:
        assert not lease.lost
        with pytest.raises(LeaseHeldError):
            Lease(path, holder=ME).acquire()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"[" * 9999, b'{"token": "../x"}'])
def test_a_damaged_lease_expires_by_its_age(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LeaseHeldError):
        Lease(path, holder=ME).acquire()
    os.utime(path, (0, 0))
    with held(path) as lease:
        assert not lease.lost


def test_a_lease_that_cannot_be_written_is_a_user_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"lease.json cannot be written"):
        Lease(path, holder=ME).acquire()
    assert read_lease(path) is None


def _compete(path: Path, barrier: Any, rounds: int, winners: Any) -> None:
    for _ in range(rounds):
        barrier.wait(30)
        lease = Lease(path, holder=ME)
        try:
            lease.acquire()
        except LeaseHeldError:
            won = False
        else:
            won = not lease.lost
        barrier.wait(30)
        assert not lease.lost
        if won:
            winners.put(os.getpid())
            # Expired, as if its machine had died; the next round takes it over.
            lease._released.set()
            edit(path, age=1000, machine="another")
        barrier.wait(30)


def test_a_race_of_takeovers_has_one_winner(path: Path) -> None:
    abandoned(path, age=1000)
    processes, rounds = 12, 40
    context = multiprocessing.get_context("fork")
    barrier, winners = context.Barrier(processes), context.SimpleQueue()
    racers = [
        context.Process(target=_compete, args=(path, barrier, rounds, winners), daemon=True)
        for _ in range(processes)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    won = []
    while not winners.empty():
        won.append(winners.get())
    assert len(won) == rounds


def test_a_stopped_holder_is_replaced_on_the_same_machine(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    stopped, lost = context.Event(), context.Queue()

    def hold() -> None:
        lease = Lease(path, holder=this_process(), expire_seconds=0.5)
        lease.acquire()
        stopped.set()
        os.kill(os.getpid(), signal.SIGSTOP)
        lost.put(lease.lost)

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    assert stopped.wait(30)
    deadline = time.monotonic() + 30
    while not read(path).expired:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with held(path) as lease:
        assert holder.pid
        os.kill(holder.pid, signal.SIGCONT)
        assert lost.get(timeout=30)
        holder.join(30)
        assert not lease.lost
