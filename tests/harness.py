"""Runs a function, or the command line, in real processes that form a gloo process group.

The processes are forked from a server that has imported torch (multiprocessing's forkserver), so a
process starts in milliseconds instead of the seconds of an import, in as clean a state as one from
the command line. Their key-value store lives in the test process and outlives every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_HOST = "127.0.0.1"
_PRELOAD = [
    *("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.tensorboard"),
    *("dist_graft.population.grafter", "dist_graft.training.trainer", "dist_graft.cli"),
]


@dataclass(frozen=True)
class Done:
    """Exit status and output of a program."""

    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class Place:
    """Rank, number of networks, and store of a process."""

    rank: int
    networks: int
    store: dist.Store
    """Lives in the test process."""


def run(
    function: Callable[..., Any],
    networks: int,
    *arguments: Any,
    ending: Collection[int] = (),
    group_timeout: float = 60,
    limit: float = 120,
) -> list[Any]:
    """Run `function(place, *arguments)` in every rank of a new gloo group.

    Args:
        function: defined at the top level of a module, so that it can be pickled.
        networks: number of ranks.
        arguments: picklable.
        ending: ranks expected to exit inside the function.
        group_timeout: timeout of the collectives, in seconds.
        limit: timeout of the whole call, in seconds; ranks still running then are killed.

    Returns: the function's results by rank; None for the ranks in `ending`.

    Raises: AssertionError with the traceback of every rank that failed or did not exit.
    """
    context = _context()
    store = dist.TCPStore(
        _HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit)
    )
    with tempfile.TemporaryDirectory() as folder:
        place = (networks, store.port, group_timeout, folder)
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


def programs(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, limit: float
) -> list[Done]:
    """Run `dist-graft` with the same arguments in concurrent processes until all have exited.

    Args:
        arguments: of the command line.
        environments: one per process.
        limit: timeout of the whole call, in seconds; processes still running then are killed.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/{k}.out", f"{folder}/{k}.err") for k in range(len(environments))]
        processes = [
            context.Process(target=_program, args=(list(arguments), dict(environment), *paths))
            for environment, paths in zip(environments, files, strict=True)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, limit)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            Done(process.exitcode or 0, *(Path(path).read_text() for path in paths))
            for process, paths in zip(processes, files, strict=True)
        ]


def _program(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Run the command line in one process of `programs`."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    for number, file in ((1, output), (2, errors)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    from dist_graft.cli import run

    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def attempt(function: Callable[[], Any]) -> Any:
    """Call a function; returns its result, or the error as (name of its type, message)."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - the error is the result
        return type(error).__name__, str(error)


def _join(ranks: list[Any], limit: float) -> list[int]:
    """Wait for all processes; returns the ranks still running after the limit."""
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
    failures = [f"rank {rank} was still running after {limit:g} s" for rank in late]
    for rank, process in enumerate(ranks):
        result, failure = folder / f"{rank}.pt", folder / f"{rank}.txt"
        if failure.exists():
            failures.append(f"rank {rank}:\n{failure.read_text()}")
        elif rank in ending:
            if result.exists():
                failures.append(f"rank {rank} returned instead of exiting")
        elif not result.exists() and rank not in late:
            failures.append(f"rank {rank} exited with code {process.exitcode}")
        complete = result.exists() and not failures
        results.append(torch.load(result, weights_only=False) if complete else None)
    assert not failures, "\n".join(failures)
    return results


def _rank(
    rank: int,
    networks: int,
    port: int,
    group_timeout: float,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Run one rank; saves its result or its traceback in the folder."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        store = dist.TCPStore(_HOST, port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=networks,
            timeout=timedelta(seconds=group_timeout),
        )
        result = function(Place(rank, networks, store), *arguments)
        dist.destroy_process_group()
        partial = Path(folder) / f"{rank}.partial"
        torch.save(result, partial)
        partial.rename(Path(folder) / f"{rank}.pt")
    except BaseException:  # noqa: BLE001 - reported by the test's process
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
