"""Starts real training processes, as a user does, on data that takes seconds."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import Done, programs

SMALL = (
    *("--data.train_samples", "64", "--data.test_samples", "40", "--data.batch_size", "32"),
    *("--model.name", "resnet20", "--runtime.device", "cpu", "--runtime.threads", "1"),
)
PAIR = ("--epochs", "3", "--seed", "5", "--optim.lr_diversity", "cosine")
"""Options of the run of two networks that most tests read."""
PROMPTLY = 20
"""Seconds within which a process with an error must exit."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ERROR = "dist-graft: error: "


def environment(**more: str) -> dict[str, str]:
    """Return this environment without a launcher's variables and without GPUs."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | more


def program(run: Path, *options: str) -> list[str]:
    """Return the command of one training process."""
    return [sys.executable, "-m", "dist_graft", "train", "--run_dir", str(run), *SMALL, *options]


def torchrun(networks: int, run: Path, *options: str) -> list[str]:
    """Return the command of a training run under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={networks}"]
    return [sys.executable, *launcher, *program(run, *options)[1:]]


def finish(command: Sequence[str], *, timeout: float, cwd: Path | None = None, **more: str) -> Done:
    """Run a program until it exits."""
    with background([command], cwd=cwd, **more) as (process,):
        return end_of(process, timeout)


def together(networks: int, run: Path, *options: str) -> list[Done]:
    """Train in several forked processes without a launcher; asserts that all succeed.

    Forked processes need not import torch.
    """
    ends = programs(program(run, *options)[3:], _environments(networks), limit=150)
    assert not any(end.status for end in ends), ends
    return ends


def end_of(process: subprocess.Popen[str], timeout: float) -> Done:
    """Wait for a program to exit and read its output."""
    output, errors = process.communicate(timeout=timeout)
    return Done(process.returncode, output, errors)


@contextmanager
def background(
    commands: Sequence[Sequence[str]], *, cwd: Path | None = None, **more: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run programs during the block, with RANK etc. if there are several; kill them at its end."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for command, variables in zip(commands, _environments(len(commands)), strict=True):
            processes.append(
                subprocess.Popen(
                    command,
                    env=variables | more,
                    cwd=cwd,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _environments(processes: int) -> list[dict[str, str]]:
    """Return the environment of each process; a single one gets no launcher variables."""
    if processes == 1:
        return [environment()]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port())}
    return [environment(**common, RANK=str(rank)) for rank in range(processes)]


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    seconds: float = 90,
    meanwhile: Sequence[subprocess.Popen[str]] = (),
) -> None:
    """Poll a condition; fails on a timeout, or when one of the programs has exited."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in meanwhile:
            ended = process.poll() is not None
            assert not ended, f"the program exited before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.01)


def saved(run: Path, epochs: int) -> Callable[[], bool]:
    """Return a function that tells whether the checkpoint after an epoch is complete."""
    return (run / "checkpoints" / f"epoch_{epochs:04d}" / "COMPLETE.json").exists


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a launcher's workers by rank."""
    lists = map(told_by_kernel, Path(f"/proc/{process.pid}/task").glob("*/children"))
    workers = {}
    for pid in (int(child) for pids in lists for child in pids.split()):
        rank = re.search(r"\0RANK=(\d+)", told_by_kernel(Path(f"/proc/{pid}/environ")))
        if rank:
            workers[int(rank.group(1))] = pid
    return [workers[rank] for rank in sorted(workers)]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    state = told_by_kernel(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def told_by_kernel(path: Path) -> str:
    """Read a file below /proc; empty if its process or thread no longer exists."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def told(done: Done, *parts: str, log: Path | None = None) -> str:
    """Return the error line of a failed program; asserts that it contains all parts.

    Also asserts that there is no traceback of this package, and that the log contains the line.
    """
    assert done.status != 0, done
    ours = re.findall(r'File ".*[/\\]dist_graft[/\\].*', done.errors + done.output)
    assert not ours, f"a traceback of this package: {done.errors}"
    lines = [line for line in done.errors.splitlines() if line.startswith(ERROR)]
    assert lines, done
    first = lines[0].removeprefix(ERROR)
    for part in parts:
        assert part in first
    if log:
        assert first in log.read_text()
    return first
