"""Cuts a run into stretches of steps between the things that happen at their ends. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """When rounds happen: every few epochs or every few steps, or never."""

    every_epochs: int = 0
    """Rounds follow the epochs N, 2N, ... of the run; 0: none."""
    every_steps: int = 0
    """Rounds follow the steps N, 2N, ... of the run, counted through all epochs; 0: none."""
    start_epoch: int = 0
    """Finished epochs before which there are no rounds."""

    @property
    def never(self) -> bool:
        """Whether there are no rounds at all."""
        return self.every_epochs == 0 and self.every_steps == 0

    def after_epoch(self, epoch: int, steps_per_epoch: int) -> bool:
        """Whether a round follows the last step of an epoch (0-based)."""
        if epoch < self.start_epoch:
            return False
        if self.every_steps:
            return (epoch + 1) * steps_per_epoch % self.every_steps == 0
        return self.every_epochs > 0 and (epoch + 1) % self.every_epochs == 0

    def inside_epoch(self, epoch: int, steps_per_epoch: int) -> list[int]:
        """Steps of an epoch before which there is a round: none is 0 or the number of steps."""
        if not self.every_steps or epoch < self.start_epoch:
            return []
        before = epoch * steps_per_epoch
        return [
            step for step in range(1, steps_per_epoch) if (before + step) % self.every_steps == 0
        ]

    def rounds_before(self, epoch: int, step: int, steps_per_epoch: int) -> int:
        """Rounds of the run that precede a step of an epoch; one that follows it does not count."""
        if self.every_steps:
            steps = epoch * steps_per_epoch + step
            skipped = self.start_epoch * steps_per_epoch // self.every_steps
            return max(0, (steps - 1 if step else steps) // self.every_steps - skipped)
        if not self.every_epochs:
            return 0
        return max(0, epoch // self.every_epochs - self.start_epoch // self.every_epochs)


@dataclass(frozen=True)
class Position:
    """How far a network has come."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Steps finished of the epoch after them."""
    round: int = 0
    """Rounds finished."""


@dataclass(frozen=True)
class Segment:
    """Steps of one epoch, and what follows them, in the order of the fields."""

    epoch: int
    """0-based."""
    first: int
    """First step, counted in the epoch."""
    last: int
    """One past the last step."""
    ends_run: bool
    evaluate: bool
    """True at the end of an epoch."""
    round: bool
    save: bool


def segments(
    *,
    epochs: int,
    steps_per_epoch: int,
    cadence: Cadence,
    save_every: int,
    start: Position = Position(),
) -> Iterator[Segment]:
    """What remains of a run, in order.

    Args:
        epochs: in all, those before `start` included.
        steps_per_epoch: optimizer steps.
        cadence: when rounds happen, counted from the start of the run.
        save_every: epochs between two checkpoint sets; 0: only the last epoch's.
        start: where the run goes on; a round that is due there comes first, without a step.
    """
    for epoch in range(start.epoch, epochs):
        first = start.step if epoch == start.epoch else 0
        here = cadence.rounds_before(epoch, first, steps_per_epoch)
        done = first > 0 and start.round > here
        for step in cadence.inside_epoch(epoch, steps_per_epoch):
            if step < first or (step == first and done):
                continue
            yield Segment(epoch, first, step, False, False, round=True, save=False)
            first = step
        finished = epoch + 1
        last = finished == epochs
        yield Segment(
            epoch=epoch,
            first=first,
            last=steps_per_epoch,
            ends_run=last,
            evaluate=True,
            round=cadence.after_epoch(epoch, steps_per_epoch),
            save=last or (save_every > 0 and finished % save_every == 0),
        )
