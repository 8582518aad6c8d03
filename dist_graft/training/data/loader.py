"""DataLoader workers that ignore signals to the process group, so that a run can stop in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dist_graft.population.runtime.process import SIGNALS


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
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_shield_worker,
        generator=torch.Generator(),  # the loader draws a base seed
    )
    # Workers inherit the signal mask, so that signals are blocked before _shield_worker runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
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
