"""Runs a function in K real processes that form one gloo process group, or the program in some.

The processes are forked from a server that has imported torch once (multiprocessing's forkserver),
so that one more costs milliseconds instead of the seconds of an import; each is as fresh as one
from the command line. Their key-value store lives in the test's process and outlives every rank.
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
    """How a program ended."""

    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class Place:
    """Where a rank finds itself."""

    rank: int
    networks: int
    store: dist.Store
    """The run's, which outlives every rank."""


def run(
    function: Callable[..., Any],
    networks: int,
    *arguments: Any,
    ending: Collection[int] = (),
    group_timeout: float = 60,
    limit: float = 120,
) -> list[Any]:
    """Run `function(place, *arguments)` in every rank of a gloo group of its own.

    Args:
        function: of a module's top level, so that a process can find it by name.
        networks: number of ranks.
        arguments: what pickle takes.
        ending: ranks that are expected to end their process inside the function.
        group_timeout: of the collectives, in seconds.
        limit: of all together, in seconds; ranks that still run then are ended.

    Returns: what the function returned, by rank; None for the ranks in `ending`.

    Raises: AssertionError with the text of every rank that failed or did not end.
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
    """Run `dist-graft` with the same arguments in several processes at once, to their ends.

    Args:
        arguments: of the command line.
        environments: of each process.
        limit: of all together, in seconds; processes that still run then are killed.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/{k}.out", f"{folder}/{k}.err") for k in range(len(environments))]
        processes = [
            context.Process(target=_program, args=(list(arguments), dict(environment), *said))
            for environment, said in zip(environments, files, strict=True)
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
            Done(process.exitcode or 0, *(Path(file).read_text() for file in said))
            for process, said in zip(processes, files, strict=True)
        ]


def _program(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """What one process of `programs` does."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    for number, file in ((1, output), (2, errors)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
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
    """What the function returns, or the error that it raises as (type's name, text)."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - the error is the result
        return type(error).__name__, str(error)


def _join(ranks: list[Any], limit: float) -> list[int]:
    """Wait for all; returns the ranks that still run after the limit."""
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
                failures.append(f"rank {rank} was to end its process and returned")
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
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What one process does; it leaves its result or its error in the folder."""
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
