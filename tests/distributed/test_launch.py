"""`dist_graft.launch` with real processes, from scripts and from an interactive session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import PROMPT_SECONDS, is_alive, run_program, running, wait_for_end, wait_until

import dist_graft
from dist_graft.errors import ConfigError, NetworkFailedError

SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from dist_graft import ConfigError, NetworkFailedError, PeerError, launch
from dist_graft.errors import StoppedEarlyError

FOLDER = Path({folder!r})

def pair_up():
    dist.init_process_group("gloo")
    return dist.get_rank()

def add(base, text):
    rank = pair_up()
    total = torch.tensor([base + rank])
    dist.all_reduce(total)
    listening = sorted({{row.split()[1].partition(":")[0] for name in ("tcp", "tcp6")
                        for row in open(f"/proc/self/net/{{name}}").readlines()[1:]
                        if row.split()[3] == "0A" and row.split()[9] in sockets()}})
    method = multiprocessing.get_start_method(allow_none=True)
    return rank, total, text, os.environ["LOCAL_RANK"], method, os.getpid(), listening

def sockets():
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return {{link[8:-1] for link in links if link.startswith("socket:")}}

def fail(rank_that_fails, error):
    rank = pair_up()
    dist.barrier()
    if rank == rank_that_fails:
        raise error
    dist.barrier()  # fails because the other process has ended

def fail_and_clean_up():
    rank = pair_up()
    dist.barrier()
    try:
        if rank == 1:
            raise LookupError("no such key")
        dist.barrier()
    finally:
        if rank == 1:
            dist.destroy_process_group()
            time.sleep(0.5)  # the other process fails before this one

def die():
    rank = pair_up()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

def wait(saves):
    stopped = threading.Event()
    if saves:
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        signal.signal(signal.SIGINT, lambda *_: stopped.set())
    (FOLDER / f"pid{{os.environ['RANK']}}").write_text(str(os.getpid()))
    while not stopped.wait(0.1):
        pass
    (FOLDER / f"saved{{os.environ['RANK']}}").touch()
    raise StoppedEarlyError("everything is saved")

if __name__ == "__main__":
    {main}
"""
LIMIT = 150
"""Seconds for a script, which imports torch in up to five processes."""
SILENT = ("torch/distributed", "multiprocessing", "OMP_NUM_THREADS", "Warning", "FAILED", "elastic")
"""What a launcher that says nothing itself does not print."""


@pytest.fixture
def script(tmp_path: Path):
    def write(main: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(folder=str(tmp_path), main=main.replace("\n", "\n    ")))
        return [sys.executable, str(path)]

    return write


def lines(output: str) -> list[str]:
    return output.strip().splitlines()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_results_are_returned_by_rank_and_sockets_listen_on_loopback(script, method: str) -> None:
    done = run_program(
        script(
            f"results = launch(add, 10, 'a $b ${{local_rank}}', networks=2, replicas=2,\n"
            f"                 start_method={method!r})\n"
            "for result in results: print(*result, sep='|')"
        ),
        timeout=LIMIT,
    )
    assert done.status == 0, done
    assert not done.errors
    rows = [line.split("|") for line in lines(done.output)]
    assert [row[:5] for row in rows] == [
        [str(rank), "tensor([46])", "a $b ${local_rank}", str(rank), "None"] for rank in range(4)
    ]
    assert len({row[5] for row in rows}) == 4
    assert {row[6] for row in rows} <= {"[]", "['0100007F']"}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_traceback_of_the_network_that_failed_reaches_the_caller(script, rank: int) -> None:
    done = run_program(
        script(f"launch(fail, {rank}, LookupError('no such key'), networks=2)"), timeout=LIMIT
    )
    assert done.status == 1
    assert f"NetworkFailedError: network {rank} (rank {rank} on " in done.errors
    assert f"Traceback of network {rank} (rank {rank}):" in done.errors
    assert "in fail" in done.errors
    assert lines(done.errors)[-1] == "LookupError: no such key"
    assert "Connection closed" not in done.errors
    assert not any(text in done.errors for text in SILENT), done.errors


REPORT = """
try:
    launch({call}, networks=2, start_method="fork")
except NetworkFailedError as error:
    print(error, error.network, error.rank, error.exit_status, bool(error.traceback), sep="|")
"""


@pytest.mark.parametrize(
    ("call", "text", "status", "has_traceback"),
    [
        ("fail, 1, ConfigError('a is wrong: use b')", "): a is wrong: use b", "2", "False"),
        ("fail, 1, SystemExit(7)", "): SystemExit: 7", "7", "True"),
        ("fail_and_clean_up", "): LookupError: no such key", "1", "True"),
        ("die", "was killed by SIGKILL", "1", "False"),
    ],
)
def test_one_line_names_network_and_rank(
    script, call: str, text: str, status: str, has_traceback: str
) -> None:
    done = run_program(script(REPORT.format(call=call)), timeout=LIMIT)
    (line,) = lines(done.output)
    message, *rest = line.split("|")
    assert message.startswith("network 1 (rank 1 on ")
    assert text in message
    assert rest == ["1", "1", status, has_traceback]


def test_the_error_of_a_script_without_a_main_guard(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import os, dist_graft\ndist_graft.launch(os.getpid, networks=1)\n")
    done = run_program([sys.executable, str(path)], timeout=LIMIT)
    assert done.status == 1
    assert 'call launch under if __name__ == "__main__":' in lines(done.errors)[-1]


@pytest.fixture
def waiting(script, tmp_path: Path, request) -> Iterator[subprocess.Popen[str]]:
    """A script with two networks that wait for a signal, and may then save."""
    saves, method = request.param
    command = script(f"launch(wait, {saves}, networks=2, start_method={method!r})")
    with running([command]) as (process,):
        pids = [tmp_path / f"pid{rank}" for rank in (0, 1)]
        wait_until(
            lambda: all(pid.exists() and pid.read_text() for pid in pids),
            "the start of both networks",
            seconds=LIMIT,
            meanwhile=[process],
        )
        yield process


def children_of(folder: Path) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("waiting", "number"),
    [((True, "spawn"), signal.SIGTERM), ((True, "fork"), signal.SIGINT)],
    indirect=["waiting"],
)
def test_a_signal_lets_the_networks_save_and_end(
    waiting: subprocess.Popen[str], number: int, tmp_path: Path
) -> None:
    waiting.send_signal(number)
    done = wait_for_end(waiting, PROMPT_SECONDS)
    assert lines(done.errors)[-1] == "dist_graft.errors.StoppedEarlyError: everything is saved"
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
    assert not any(map(is_alive, children_of(tmp_path)))


@pytest.mark.parametrize("waiting", [(False, "fork")], indirect=True)
@pytest.mark.parametrize(
    ("number", "last"),
    [
        (signal.SIGTERM, "dist_graft.errors.StoppedError: stopped by SIGTERM"),
        (signal.SIGINT, "KeyboardInterrupt"),
        (signal.SIGKILL, None),
    ],
)
def test_no_network_outlives_its_launcher(
    waiting: subprocess.Popen[str], number: int, last: str | None, tmp_path: Path
) -> None:
    pids = children_of(tmp_path)
    waiting.send_signal(number)
    done = wait_for_end(waiting, PROMPT_SECONDS)
    assert done.status
    assert last is None or lines(done.errors)[-1] == last
    wait_until(
        lambda: not any(map(is_alive, pids)), "the end of both networks", seconds=PROMPT_SECONDS
    )


def test_an_interactive_session_forks_and_keeps_its_signal_handlers() -> None:
    session = """
import signal, torch
from dist_graft import NetworkFailedError, launch
torch.mm(torch.ones(500, 500), torch.ones(500, 500))  # starts this session's threads
factor = 3
def main(base):
    import torch.distributed as dist
    dist.init_process_group("gloo")
    torch.mm(torch.ones(500, 500), torch.ones(500, 500))
    return base + factor * dist.get_rank()

def broken():
    raise LookupError("no such key")

print(launch(main, 1, networks=2))
try:
    launch(broken, networks=2)
except NetworkFailedError as error:
    print("in broken" in error.traceback)

print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""
    done = subprocess.run(
        [sys.executable, "-"],
        check=False,
        input=session,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert lines(done.stdout) == ["[1, 4]", "True", "True"], done.stderr
    assert not done.stderr


def test_arguments_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, text in (
        ({"networks": 0}, "networks must be at least 1, got 0"),
        ({"networks": 1, "replicas": 0}, "replicas must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            dist_graft.launch(os.getpid, **sizes)
    with pytest.raises(ConfigError, match=r'cannot be sent .* pass start_method="fork"'):
        dist_graft.launch(lambda: None, networks=1, start_method="spawn")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="RANK is set"):
        dist_graft.launch(os.getpid, networks=1)


def test_the_error_holds_the_traceback_as_a_note() -> None:
    error = NetworkFailedError("network 1: text", network=1, rank=2, traceback="a\nb\n")
    assert str(error) == "network 1: text"
    assert error.__notes__ == ["Traceback of network 1 (rank 2):\na\nb"]
