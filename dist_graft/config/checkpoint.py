"""Options of checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

from dist_graft.config.validation import MAX_SECONDS, above_zero, at_least, at_most


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to checkpoint, and how many checkpoints to keep."""

    every: int = 1
    """Epochs between checkpoints; 0: checkpoint after the last epoch only."""
    every_minutes: float | None = None
    """Also save a checkpoint after this many minutes, at the next of 20 evenly spaced points in the
    epoch."""
    keep: int = 2
    """Number of latest complete checkpoints to keep. Those at the end of an epoch take precedence;
    in addition, the last two within the current epoch are kept."""
    before_last_round: bool = False
    """Also save the weights of each network just before the last round, so that evaluate measures
    the loss barrier before and after it."""
    max_failures: int = 3
    """Consecutive checkpoints that may fail to be written (for example on a full disk) before the
    run aborts."""
    grace_seconds: float = 25.0
    """Time limit for a run that is asked to stop to save a checkpoint and exit."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        above_zero("checkpoint.every_minutes", self.every_minutes)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.max_failures", self.max_failures, 0)
        above_zero("checkpoint.grace_seconds", self.grace_seconds)
        at_most("checkpoint.grace_seconds", self.grace_seconds, MAX_SECONDS)
