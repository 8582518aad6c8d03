"""status.json: the current state of one network's process, for `dist-graft status`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_graft.errors import (
    LeaseHeldError,
    RunDirectoryError,
    StoppedAtStartError,
    StoppedEarlyError,
)
from dist_graft.monitoring.callback import Callback
from dist_graft.run_directory import write_atomically

if TYPE_CHECKING:
    from dist_graft.monitoring.metrics import EpochReport
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.training.trainer import Trainer

Phase = Literal[
    "starting", "training", "evaluating", "synchronizing", "finished", "stopped", "failed"
]
ENDED: tuple[Phase, ...] = ("finished", "stopped", "failed")
HEARTBEAT_SECONDS = 5.0
"""Between two writes of the file."""


@dataclass(kw_only=True)
class Status:
    """Content of status.json."""

    network: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    phase: Phase = "starting"
    """synchronizing: with the other networks, in a round or a report."""
    epoch: int = 0
    """Current epoch, 0-based."""
    epochs: int = 0
    step: int = 0
    """Steps finished in the epoch."""
    steps_per_epoch: int = 0
    train_samples: int = 0
    """Training samples in an epoch."""
    rounds: int = 0
    """Rounds finished."""
    images_per_second: float | None = None
    """Training speed in this epoch so far."""
    seconds_left: float | None = None
    """Estimate until the end of the run."""
    reason: str | None = None
    """Why the run failed or stopped."""
    time: float = 0.0
    """When this was written, in seconds since 1970."""


class RemainingTime:
    """Estimates the remaining time of a run."""

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self._epochs = epochs
        self._steps = max(1, steps_per_epoch)
        self._started: float | None = None
        self._first = 0
        self._epoch_started = 0.0
        self._epoch_duration: float | None = None
        self._started_at_zero = False

    def start_epoch(self, epoch: int, done: int, now: float) -> None:
        """Record that an epoch (0-based) starts or resumes after `done` steps."""
        if self._started is None:
            self._started, self._first = now, epoch * self._steps + done
        elif self._started_at_zero:
            self._epoch_duration = now - self._epoch_started
        self._epoch_started, self._started_at_zero = now, done == 0

    def seconds(self, epoch: int, step: int, now: float) -> float | None:
        """Seconds left, evaluations and rounds included; None before the first step.

        Based on the last complete epoch, or on the steps so far in the first one.
        """
        done = epoch * self._steps + step
        if self._epoch_duration is not None:
            # Evaluation and round of the epoch are still ahead when its steps are done.
            rest = (self._epochs - epoch) * self._epoch_duration - (now - self._epoch_started)
            return max(0.0, rest)
        if self._started is None or done <= self._first:
            return None
        return (self._epochs * self._steps - done) * (now - self._started) / (done - self._first)


class StatusFile(Callback):
    """Writes status.json every few seconds, from a thread.

    The heartbeat distinguishes a process that hangs or has exited from one with slow steps. Disk
    errors never interrupt training.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lease_lost: Callable[[], bool] = lambda: False
        self._remaining: RemainingTime | None = None
        self._batch = 0
        self._first = 0
        self._train_start = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer) -> None:
        self._handled = sys.exception()  # that the caller of `fit` is handling
        self._status = Status(network=trainer.process.network)
        self._lease_lost = lambda: trainer.lease_lost
        if trainer.process.is_leader:
            self._path = trainer.directory.status(trainer.process.network)
            self._write()
            self._thread = threading.Thread(target=self._heartbeat, name="status.json", daemon=True)
            self._thread.start()

    def on_fit_start(self, trainer: Trainer) -> None:
        self._remaining = RemainingTime(trainer.config.epochs, trainer.steps_per_epoch)
        self._batch = trainer.config.data.batch_size
        self._status.epochs = trainer.config.epochs
        self._status.steps_per_epoch = trainer.steps_per_epoch
        self._status.train_samples = trainer.data.train_size
        self._status.rounds = trainer.round

    def on_epoch_start(self, trainer: Trainer) -> None:
        assert self._remaining is not None
        now = time.monotonic()
        self._remaining.start_epoch(trainer.epoch, trainer.step, now)
        self._first, self._train_start = trainer.step, now
        status = self._status
        status.phase, status.epoch, status.step = "training", trainer.epoch, trainer.step

    def on_step_end(self, trainer: Trainer) -> None:
        self._status.phase, self._status.step = "training", trainer.step
        self._status.rounds = trainer.round

    def on_evaluate_start(self, trainer: Trainer) -> None:
        self._status.images_per_second = self._speed()
        self._status.phase = "evaluating"

    def on_round_start(self, trainer: Trainer) -> None:
        self._status.phase = "synchronizing"

    def on_round_end(self, trainer: Trainer, record: GraftRecord) -> None:
        self._status.rounds = trainer.round

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        self._status.rounds = trainer.round

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        if isinstance(error, LeaseHeldError):  # the file belongs to another process now
            self._path = None
        stopped = isinstance(error, StoppedAtStartError | StoppedEarlyError)
        self._status.phase = "stopped" if stopped else "failed"
        self._status.reason = " ".join(str(error).split()) or type(error).__name__

    def teardown(self, trainer: Trainer) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join(HEARTBEAT_SECONDS)  # a disk that hangs does not block the process
        if self._status.phase not in ENDED and sys.exception() is self._handled:
            self._status.phase = "finished"
            self._status.epochs, self._status.rounds = trainer.config.epochs, trainer.round
        self._write()

    def seconds_left(self) -> float | None:
        """Estimate until the end of the run."""
        status = self._status
        if self._remaining is None:
            return None
        return self._remaining.seconds(status.epoch, status.step, time.monotonic())

    def _speed(self) -> float | None:
        steps = self._status.step - self._first
        seconds = time.monotonic() - self._train_start
        return steps * self._batch / seconds if steps else None

    def _heartbeat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            if self._status.phase == "training":
                self._status.images_per_second = self._speed()
            self._write()

    def _write(self) -> None:
        if self._path is None or self._lease_lost():
            return
        left = None if self._status.phase in ENDED else self.seconds_left()
        content: Mapping[str, object] = asdict(self._status) | {
            "seconds_left": left,
            "time": time.time(),
        }
        if not self._path.parent.exists():  # deleted; the next epoch creates it again
            return
        with contextlib.suppress(RunDirectoryError):  # a full disk: the log and metrics report it
            write_atomically(self._path, (json.dumps(content) + "\n").encode(), durable=False)
