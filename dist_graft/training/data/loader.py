"""Loader workers that only the trainer ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from dist_graft.population.runtime.process import SIGNALS


def start_loading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the loader's workers, which must have `shield_worker`, and iterate over its batches.

    The signals wait meanwhile: a worker inherits that, so that it is never open to one, not even
    before it runs `shield_worker`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(_: int) -> None:
    """Let only the trainer end this loader worker; for worker_init_fn.

    Ctrl-C and job schedulers signal all processes; the trainer needs its workers until the step
    at which it stops. Its own SIGTERM, at exit, must get through, or it would wait forever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_obey, args=(trainer.pid,), daemon=True).start()


def _obey(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
