"""When rounds, evaluations and checkpoints take place, as pure functions of step numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """When rounds take place: every N epochs, every N steps, or never."""

    every_epochs: int = 0
    """Rounds follow epochs N, 2N, ... of the run; 0: no rounds."""
    every_steps: int = 0
    """Rounds follow optimizer steps N, 2N, ... of the run, counted across epochs; 0: no rounds."""
    start_epoch: int = 0
    """Epochs that must be finished before the first round."""

    @property
    def never(self) -> bool:
        """Whether there are no rounds."""
        return self.every_epochs == 0 and self.every_steps == 0

    def after_epoch(self, epoch: int, steps_per_epoch: int) -> bool:
        """Whether a round follows the last step of an epoch (0-based)."""
        if epoch < self.start_epoch:
            return False
        if self.every_steps:
            return (epoch + 1) * steps_per_epoch % self.every_steps == 0
        return self.every_epochs > 0 and (epoch + 1) % self.every_epochs == 0

    def inside_epoch(self, epoch: int, steps_per_epoch: int) -> list[int]:
        """Steps of an epoch that a round precedes, except 0 and the number of steps."""
        if not self.every_steps or epoch < self.start_epoch:
            return []
        before = epoch * steps_per_epoch
        return [
            step for step in range(1, steps_per_epoch) if (before + step) % self.every_steps == 0
        ]

    def rounds_before(self, epoch: int, step: int, steps_per_epoch: int) -> int:
        """Number of rounds of the run that precede a step of an epoch."""
        if self.every_steps:
            steps = epoch * steps_per_epoch + step
            skipped = self.start_epoch * steps_per_epoch // self.every_steps
            return max(0, (steps - 1 if step else steps) // self.every_steps - skipped)
        if not self.every_epochs:
            return 0
        return max(0, epoch // self.every_epochs - self.start_epoch // self.every_epochs)


@dataclass(frozen=True)
class Position:
    """How far a network has trained."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Steps finished in the current epoch."""
    round: int = 0
    """Rounds finished."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one epoch, and what follows them, in the order of the fields."""

    epoch: int
    """0-based."""
    first: int
    """First step, counted in the epoch."""
    last: int
    """One past the last step."""
    evaluate: bool = False
    """True at the end of an epoch."""
    round: bool = False
    vote: bool = False
    """Whether the networks vote on a checkpoint (checkpoint.every_minutes)."""
    save: bool = False
    """Whether a checkpoint is due at the end of the epoch."""


def epoch_segments(
    epoch: int,
    *,
    epochs: int,
    steps_per_epoch: int,
    cadence: Cadence,
    save_every: int,
    votes: int = 0,
    votes_after: int = 0,
    first: int = 0,
    rounds: int = 0,
) -> Iterator[Segment]:
    """Segments of one epoch, in order.

    Args:
        epoch: 0-based.
        epochs: number of epochs of the run.
        steps_per_epoch: optimizer steps per epoch.
        cadence: when rounds take place, counted from the start of the run.
        save_every: epochs between two checkpoints; 0: only after the last epoch.
        votes: evenly spaced points inside the epoch at which the networks agree whether to save a
            checkpoint, besides the end of the epoch; 0: none.
        votes_after: step after which the networks vote. When they resume at different steps of an
            epoch, it must be the largest of these, so that all take part in the same votes.
        first: step at which a resumed epoch continues. A round that is due there comes first, in
            a segment without steps.
        rounds: rounds finished when a resumed epoch continues.
    """
    due_before = cadence.rounds_before(epoch, first, steps_per_epoch)
    round_done = first > 0 and rounds > due_before
    round_steps = set(cadence.inside_epoch(epoch, steps_per_epoch))
    vote_steps = _evenly_spaced(steps_per_epoch, votes)
    for step in sorted(round_steps | vote_steps):
        has_round = step in round_steps and not (step == first and round_done)
        has_vote = step in vote_steps and step > votes_after
        if step < first or not (has_round or has_vote):
            continue
        yield Segment(epoch, first, step, round=has_round, vote=has_vote)
        first = step
    finished = epoch + 1
    yield Segment(
        epoch=epoch,
        first=first,
        last=steps_per_epoch,
        evaluate=True,
        round=cadence.after_epoch(epoch, steps_per_epoch),
        vote=votes > 0,
        save=finished == epochs or (save_every > 0 and finished % save_every == 0),
    )


def _evenly_spaced(steps: int, points: int) -> set[int]:
    """Steps strictly inside an epoch that split it into points + 1 parts."""
    return {steps * point // (points + 1) for point in range(1, points + 1)} - {0, steps}
