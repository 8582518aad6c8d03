"""DataLoader workers: their number, and their start.

Workers ignore signals to the process group, so that a run can stop in order.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from dist_graft.population.runtime.process import SIGNALS
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info

_MOST_WORKERS = 16
"""More are seldom useful, and each takes memory for its process and its batches."""
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def worker_count(option: int | Literal["auto"]) -> int:
    """Number of loader workers of this process.

    auto: one for each of its cores but one, which trains; at least 1 and at most 16.
    """
    if option != "auto":
        return option
    process = read_process_info()
    cores = min(process.cpu_share(), loader_cores(process) // process.local_world_size)
    return min(max(cores - 1, 1), _MOST_WORKERS)


def loader_cores(process: ProcessInfo) -> int:
    """Number of CPU cores for all processes of this machine, within a container's CPU quota."""
    with suppress(OSError):  # no cgroup v2, or no container
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            return min(process.cores(), math.ceil(int(quota) / int(period)))
    return process.cores()


def too_many_workers(workers: int, process: ProcessInfo) -> str:
    """Warning about more loader workers than cores on this machine; empty if there are not."""
    processes, cores = process.local_world_size, loader_cores(process)
    if workers * processes <= cores:
        return ""
    return (
        f"loader workers on this machine: {processes * workers} (data.workers {workers} in each of "
        f"{processes} processes), cores: {cores}; lower data.workers, or start fewer processes"
    )


def start_loading(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    device: torch.device,
    collate: Callable[[Any], Any],
) -> Iterator[Any]:
    """Start the loader workers and return an iterator over the collated batches.

    The workers exit when the iterator is exhausted or garbage collected; a generator that holds
    the only reference stops them in its `close()`. The global random state is left unchanged.

    Args: batches: what the dataset is indexed with, one list per batch. workers: 0 loads in this
    process. device: pinned memory is used if it is a GPU.
    """
    # Workers inherit the signal mask, so that signals are blocked before _shield_worker runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with warnings.catch_warnings():  # too_many_workers counts those of all processes
            warnings.filterwarnings("ignore", ".*suggested max number of worker")
            return iter(
                DataLoader(
                    dataset,
                    batch_sampler=batches,
                    num_workers=workers,
                    collate_fn=collate,
                    pin_memory=device.type == "cuda",
                    worker_init_fn=_shield_worker,
                    generator=torch.Generator(),  # the loader draws a base seed
                )
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shield_worker(_: int) -> None:
    """Make a worker exit on SIGTERM from the trainer only.

    Ctrl-C and job schedulers signal every process, but the trainer needs its workers until the step
    at which it stops. The trainer itself sends SIGTERM at exit and then waits for the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_exit_on_sigterm_from, args=(trainer.pid,), daemon=True).start()


def _exit_on_sigterm_from(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
