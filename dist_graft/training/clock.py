"""Cuts a run into stretches of steps between the things that happen at their ends. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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
    round: bool
    save: bool


def segments(
    *,
    epochs: int,
    steps_per_epoch: int,
    round_every: int,
    save_every: int,
    start_epoch: int = 0,
) -> Iterator[Segment]:
    """What remains of a run, in order.

    Args:
        epochs: in all, those before `start_epoch` included.
        steps_per_epoch: optimizer steps.
        round_every: epochs between two rounds, counted from the start of the run; 0: no rounds.
        save_every: epochs between two checkpoint sets; 0: only the last epoch's.
        start_epoch: epochs that are finished.
    """
    for epoch in range(start_epoch, epochs):
        finished = epoch + 1
        last = finished == epochs
        yield Segment(
            epoch=epoch,
            first=0,
            last=steps_per_epoch,
            ends_run=last,
            evaluate=True,
            round=round_every > 0 and finished % round_every == 0,
            save=last or (save_every > 0 and finished % save_every == 0),
        )
