"""Options of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from dist_graft.config.validation import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = 1
    """Epochs between two checkpoint sets; 0: none but the last epoch's."""
    every_minutes: float | None = None
    """Minutes after the last checkpoint set at which there is another, also inside an epoch."""
    keep: int = 2
    """Newest complete sets that are kept."""
    max_failures: int = 3
    """Sets in a row that may fail to be written (a full disk) before the run ends."""
    grace_seconds: float = 25.0
    """Within which a run that is asked to stop must have saved and left."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        if self.every_minutes is not None:
            above_zero("checkpoint.every_minutes", self.every_minutes)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.max_failures", self.max_failures, 0)
        above_zero("checkpoint.grace_seconds", self.grace_seconds)
