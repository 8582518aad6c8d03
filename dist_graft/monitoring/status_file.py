"""Where one network stands right now: on a bar, and in a small file that anybody may read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from dist_graft.errors import StoppedEarlyError
from dist_graft.monitoring.console import ProgressBar

Phase = Literal["starting", "training", "evaluating", "meeting", "finished", "stopped", "failed"]
ENDED: tuple[Phase, ...] = ("finished", "stopped", "failed")
BEAT_SECONDS = 5.0
"""Between two writings of the file."""


@dataclass(kw_only=True)
class Status:
    """What status.json holds: the last word of a network's process."""

    network: int
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    phase: Phase = "starting"
    """meeting: in a round, a report or the wait for them."""
    epoch: int = 0
    """Under way, 0-based."""
    epochs: int = 0
    step: int = 0
    """Steps of the epoch that are done."""
    steps_per_epoch: int = 0
    rounds: int = 0
    """Finished."""
    images_per_second: float | None = None
    """Of this epoch's training so far."""
    seconds_left: float | None = None
    """Until the run ends, as far as can be told."""
    reason: str | None = None
    """Why the run failed or stopped."""
    time: float = 0.0
    """When this was written, in seconds since 1970."""


class Pace:
    """How long the rest of a run takes, by how long what this process lived through took.

    Args:
        epochs: of the run.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self._epochs = epochs
        self._steps = max(1, steps_per_epoch)
        self._began: float | None = None
        self._first = 0
        self._epoch_began = 0.0
        self._whole_epoch: float | None = None
        self._started_at_zero = False

    def begin(self, epoch: int, done: int, now: float) -> None:
        """An epoch (0-based) goes on, or begins, with so many steps done."""
        if self._began is None:
            self._began, self._first = now, epoch * self._steps + done
        elif self._started_at_zero:
            self._whole_epoch = now - self._epoch_began
        self._epoch_began, self._started_at_zero = now, done == 0

    def left(self, epoch: int, step: int, now: float) -> float | None:
        """Seconds, evaluations and rounds included; None before the first step.

        By the last whole epoch; in the first one by its steps so far.
        """
        done = epoch * self._steps + step
        if self._whole_epoch is not None:
            # An epoch's end, evaluation and round, is still to come when its steps are done.
            rest = (self._epochs - epoch) * self._whole_epoch - (now - self._epoch_began)
            return max(0.0, rest)
        if self._began is None or done <= self._first:
            return None
        return (self._epochs * self._steps - done) * (now - self._began) / (done - self._first)


class StatusFile:
    """Tells where a network stands until the block is left.

    A thread writes the file every few seconds, so that a process that hangs or is gone can be told
    from one that takes long steps; a disk that refuses is no matter of the training.

    Args:
        path: of the file, whose folder exists; None: there is no file.
        network: of this process.
        bar: shows the steps.
    """

    def __init__(self, path: Path | None, network: int, bar: ProgressBar) -> None:
        self._path = path
        self._bar = bar
        self._standing = Status(network=network)
        self._pace: Pace | None = None
        self._batch = 0
        self._first = 0
        self._trained_from = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="status.json", daemon=True)

    def __enter__(self) -> StatusFile:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._left.set()
        self._thread.join(BEAT_SECONDS)  # a disk that hangs does not hold the process
        phase: Phase = "failed" if error else "finished"
        if isinstance(error, StoppedEarlyError):
            phase = "stopped"
        reason = " ".join(str(error).split()) or type(error).__name__ if error else None
        self._standing.phase, self._standing.reason = phase, reason
        self._write()

    def prepare(self, *, epochs: int, steps_per_epoch: int, batch_size: int, rounds: int) -> None:
        """Learn how long the run is, and how many rounds are behind it."""
        self._pace = Pace(epochs, steps_per_epoch)
        self._batch = batch_size
        self._standing.epochs, self._standing.steps_per_epoch = epochs, steps_per_epoch
        self._standing.rounds = rounds

    def begin(self, epoch: int, step: int) -> None:
        """An epoch (0-based) begins, or goes on, after so many of its steps."""
        assert self._pace is not None
        now = time.monotonic()
        self._pace.begin(epoch, step, now)
        self._first, self._trained_from = step, now
        standing = self._standing
        standing.phase, standing.epoch, standing.step = "training", epoch, step
        self._bar.start(
            steps=standing.steps_per_epoch,
            done=step,
            epoch=epoch,
            epochs=standing.epochs,
            left=self.seconds_left,
        )

    def step(self) -> None:
        """One step is done."""
        self._standing.phase = "training"
        self._standing.step += 1
        self._bar.step()

    def evaluating(self) -> None:
        """The epoch's training is over."""
        self._bar.stop()
        self._standing.images_per_second = self._speed()
        self._standing.phase = "evaluating"

    def meeting(self) -> None:
        """Goes to meet the other networks."""
        self._standing.phase = "meeting"

    def met(self, rounds: int) -> None:
        """So many rounds are finished."""
        self._standing.rounds = rounds

    def seconds_left(self) -> float | None:
        """Until the run ends, as far as can be told."""
        standing = self._standing
        if self._pace is None:
            return None
        return self._pace.left(standing.epoch, standing.step, time.monotonic())

    def _speed(self) -> float | None:
        steps = self._standing.step - self._first
        seconds = time.monotonic() - self._trained_from
        return steps * self._batch / seconds if steps else None

    def _beat(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            if self._standing.phase == "training":
                self._standing.images_per_second = self._speed()
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        ended = self._standing.phase in ENDED
        moment = {"seconds_left": None if ended else self.seconds_left(), "time": time.time()}
        content = asdict(self._standing) | moment
        temporary = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # full or gone for a while: other files tell of it
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(self._path)
