"""When rounds, evaluations and checkpoints take place, as pure functions of step numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """When rounds take place: every N epochs, every N steps, after listed steps, or never."""

    every_epochs: int = 0
    """Rounds follow epochs N, 2N, ... of the run; 0: no rounds."""
    every_steps: int = 0
    """Rounds follow optimizer steps N, 2N, ... of the run, counted across epochs; 0: no rounds."""
    start_epoch: int = 0
    """Epochs that must be finished before the first round."""
    stop_epoch: int = 0
    """No rounds after this many epochs; 0: no limit."""
    after_steps: tuple[int, ...] = ()
    """Numbers of finished steps of the run after which rounds follow, ascending; replaces the
    interval. See `quadratic_steps`."""

    @property
    def never(self) -> bool:
        """Whether there are no rounds."""
        return not (self.every_epochs or self.every_steps or self.after_steps)

    def after_epoch(self, epoch: int, steps_per_epoch: int) -> bool:
        """Whether a round follows the last step of an epoch (0-based)."""
        return self._follows((epoch + 1) * steps_per_epoch, steps_per_epoch)

    def inside_epoch(self, epoch: int, steps_per_epoch: int) -> list[int]:
        """Steps of an epoch that a round precedes, except 0 and the number of steps."""
        before = epoch * steps_per_epoch
        return [
            step
            for step in range(1, steps_per_epoch)
            if self._follows(before + step, steps_per_epoch)
        ]

    def rounds_before(self, epoch: int, step: int, steps_per_epoch: int) -> int:
        """Number of rounds of the run that precede a step of an epoch."""
        steps = epoch * steps_per_epoch + step
        return self._count(steps - 1 if step else steps, steps_per_epoch)

    def is_last(self, steps: int, *, epochs: int, steps_per_epoch: int) -> bool:
        """Whether the last round of a run of `epochs` follows directly after `steps`."""
        rounds = self._count(epochs * steps_per_epoch, steps_per_epoch)
        return self._follows(steps, steps_per_epoch) and (
            self._count(steps, steps_per_epoch) == rounds
        )

    def _follows(self, steps: int, steps_per_epoch: int) -> bool:
        """Whether a round follows after this many finished steps of the run."""
        count, before = (self._count(number, steps_per_epoch) for number in (steps, steps - 1))
        return count > before

    def _count(self, steps: int, steps_per_epoch: int) -> int:
        """Number of rounds in the first steps of the run, including one after the last of them."""
        first = self.start_epoch * steps_per_epoch
        if self.stop_epoch:
            steps = min(steps, self.stop_epoch * steps_per_epoch)
        if self.after_steps:
            before, rounds = (bisect_right(self.after_steps, number) for number in (first, steps))
            return max(0, rounds - before)
        every = self.every_steps or self.every_epochs * steps_per_epoch
        return max(0, steps // every - first // every) if every else 0


def quadratic_steps(
    lr: Callable[[int], float], *, alpha: float, base: int, first: int, last: int
) -> tuple[int, ...]:
    """Numbers of finished steps after which rounds follow: the Quadratic Synchronization Rule.

    From the round after t steps, the next one follows max(base, floor((alpha / lr(t))^2)) steps
    later, or after the last step, whichever comes first (arXiv 2310.14423).

    Args:
        lr: learning rate of a step of the run, counted from 0.
        alpha: growth coefficient: intervals exceed `base` once lr < alpha / sqrt(base).
        base: smallest number of steps between two rounds.
        first: steps before the first interval.
        last: steps after which the last round follows.
    """
    found: list[int] = []
    steps = first
    while steps < last:
        ratio = alpha / lr(steps) if lr(steps) > 0 else math.inf
        longest = float(last - steps)  # bounds the square, which may overflow
        grown = longest if ratio >= math.sqrt(longest) else ratio**2
        steps = min(last, steps + max(base, math.floor(grown)))
        found.append(steps)
    return tuple(found)


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
