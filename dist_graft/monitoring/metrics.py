"""One line an epoch and network, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_graft.monitoring.jsonl import JsonLinesFile


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one network did in one epoch. Accuracies are percentages."""

    epoch: int
    """0-based."""
    lr: float
    """At the start of the epoch."""
    train_loss: float
    train_accuracy: float
    test_loss: float
    """Before the round."""
    test_accuracy: float
    """Before the round."""
    val_loss: float | None
    """None without a validation split."""
    val_accuracy: float | None
    images_per_second: float
    """Of training."""
    phase_seconds: dict[str, float]
    """Where the time went since the epoch before was reported: data, step, round, evaluation,
    checkpoint, other."""
    information: dict[str, float]
    """By graft unit, before the round, in the criterion's unit."""
    graft: dict[str, Any] | None
    """None in an epoch without a round."""


class MetricsFile:
    """Appends to metrics.jsonl; what lies past the start is dropped first.

    Args:
        path: of the file; its folder exists.
        start_epoch: first epoch that will be written.

    Raises: RunDirectoryError when the disk refuses.
    """

    def __init__(self, path: Path, *, start_epoch: int) -> None:
        self._lines = JsonLinesFile(path, keep=lambda line: line["epoch"] < start_epoch)
        self.kept = self._lines.kept
        """Of an earlier start of the run, in order."""

    @property
    def vanished(self) -> bool:
        """Whether the file is no longer there."""
        return self._lines.vanished

    def write(self, metrics: EpochMetrics) -> None:
        """Append one line; numbers that JSON does not know (NaN, infinity) become null.

        Raises: RunDirectoryError when the disk refuses; the next call writes this line, too.
        """
        self._lines.write(asdict(metrics))
