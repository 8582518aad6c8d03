"""Run a function in several processes that form one process group, or a program in one process.

The processes are forked from a server that has imported torch (multiprocessing's forkserver), which
saves the seconds of the import. The key-value store runs in the test's process and outlives all
ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dist_graft.population.runtime.devices import shared_gpu_variables

_HOST = "127.0.0.1"
_PRELOAD = [
    *("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.tensorboard"),
    *("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "docstring_parser"),
    *("dist_graft.population.grafter", "dist_graft.training.trainer", "dist_graft.cli"),
]
"""torch._dynamo is imported by the first optimizer."""


@dataclass(frozen=True)
class Done:
    """Exit status and output of a program."""

    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class RankContext:
    """Rank of a process, the store of its run, and its device."""

    rank: int
    networks: int
    store: dist.Store
    """Runs in the test's process and outlives all ranks."""
    device: torch.device


def run(
    function: Callable[..., Any],
    networks: int,
    *arguments: Any,
    device: str = "cpu",
    ending: Collection[int] = (),
    group_timeout: float = 60,
    limit: float = 120,
) -> list[Any]:
    """Run `function(context, *arguments)` in every rank of a new group.

    Args:
        function: defined at the top level of a module.
        networks: number of ranks.
        arguments: picklable.
        device: "cpu" (gloo), or "cuda" (gloo and NCCL; ranks share GPUs if there are too few).
        ending: ranks that are expected to exit inside the function.
        group_timeout: of collectives, in seconds.
        limit: for all ranks, in seconds; ranks that still run are killed.

    Returns: results of the function, by rank; None for the ranks in `ending`.

    Raises: AssertionError with the traceback of every rank that failed or did not end.
    """
    context = _context()
    store = dist.TCPStore(
        _HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit)
    )
    with tempfile.TemporaryDirectory() as folder:
        place = (networks, store.port, group_timeout, folder, device)
        ranks = [
            context.Process(
                target=_rank, args=(rank, *place, function, arguments), name=f"rank {rank}"
            )
            for rank in range(networks)
        ]
        for process in ranks:
            process.start()
        try:
            late = _join(ranks, limit)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return _results(ranks, Path(folder), ending, late, limit)


class Program:
    """A Python program in a process that is forked from a server which has imported torch.

    Has the interface of subprocess.Popen as far as the tests use it.

    Args:
        command: sys.executable, then `-m MODULE` or a script, and its arguments.
        environment: of the process; its PYTHONPATH comes first in sys.path.
        cwd: working directory, if not this one.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        assert command[0] == sys.executable
        self.args = list(command)
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for path in self._files:
            path.touch()
        self._output: tuple[str, str] | None = None
        arguments = (self.args[1:], dict(environment), cwd, *map(str, self._files))
        self._process = _context().Process(target=_program, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        self._process.join(0)
        status: int | None = self._process.exitcode
        return status

    @property
    def returncode(self) -> int | None:
        """Exit status; None while the program runs."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, unless the program has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, unless the program has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the program, and return its output and its errors."""
        if self._output is None:
            self._process.join(timeout)
            if self.poll() is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            output, errors = (path.read_text() for path in self._files)
            self._output = output, errors
            self._folder.cleanup()
        return self._output


def _program(
    command: list[str], environment: dict[str, str], cwd: Path | None, *files: str
) -> None:
    """Entry point of the process of a `Program`."""
    multiprocessing.set_start_method(None, force=True)  # of loader workers, as in any program
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    first = str(Path.cwd()) if command[0] == "-m" else str(Path(command[0]).parent.absolute())
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # The server imports torch, and programs set this before they do.
    with patch.dict(os.environ, TORCH_CPP_LOG_LEVEL="ERROR"):
        forkserver.ensure_running()
    return context


def result_or_error(function: Callable[[], Any]) -> Any:
    """Result of the function, or (type name, text) of the error that it raises."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - the error is the result
        return type(error).__name__, str(error)


def _join(ranks: list[Any], limit: float) -> list[int]:
    """Wait for all ranks; returns those that still run after the limit."""
    deadline = time.monotonic() + limit
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            del running[sentinel]
    return sorted(running.values())


def _results(
    ranks: list[Any], folder: Path, ending: Collection[int], late: list[int], limit: float
) -> list[Any]:
    results: list[Any] = []
    failures = [f"rank {rank} still ran after {limit:g} s" for rank in late]
    for rank, process in enumerate(ranks):
        result, failure = folder / f"{rank}.pt", folder / f"{rank}.txt"
        if failure.exists():
            failures.append(f"rank {rank}:\n{failure.read_text()}")
        elif rank in ending:
            if result.exists():
                failures.append(f"rank {rank} should have exited and returned")
        elif not result.exists() and rank not in late:
            failures.append(f"rank {rank} ended with exit code {process.exitcode}")
        whole = result.exists() and not failures
        results.append(torch.load(result, weights_only=False) if whole else None)
    assert not failures, "\n".join(failures)
    return results


def _rank(
    rank: int,
    networks: int,
    port: int,
    group_timeout: float,
    folder: str,
    kind: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Entry point of a process of `run`; writes its result or its error into the folder."""
    try:
        torch.set_num_threads(1)
        device = torch.device("cpu")
        if kind == "cuda":
            os.environ.update(shared_gpu_variables(rank, networks))
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        else:
            warnings.simplefilter("error")
        store = dist.TCPStore(_HOST, port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group(
            "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=networks,
            timeout=timedelta(seconds=group_timeout),
            device_id=None if kind == "cpu" else device,
        )
        result = function(RankContext(rank, networks, store, device), *arguments)
        dist.destroy_process_group()
        partial = Path(folder) / f"{rank}.partial"
        torch.save(result, partial)
        partial.rename(Path(folder) / f"{rank}.pt")
    except BaseException:  # noqa: BLE001 - reported by the test
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
