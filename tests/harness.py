"""Run a function, or the program, in several processes that form one process group.

The processes are forked from a server that has imported torch (multiprocessing's forkserver), which
saves the seconds of the import. The key-value store runs in the test's process and outlives all
ranks.
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

from dist_graft.population.runtime.devices import shared_gpu_variables

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


def programs(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, limit: float
) -> list[Done]:
    """Run `dist-graft` with the same arguments in several processes.

    Args:
        arguments: of the command line.
        environments: of each process.
        limit: for all processes, in seconds; those that still run are killed.
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
            Done(process.exitcode or 0, *(Path(file).read_text() for file in paths))
            for process, paths in zip(processes, files, strict=True)
        ]


def _program(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Entry point of a process of `programs`."""
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
