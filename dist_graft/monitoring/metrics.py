"""One line an epoch and network, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_graft.errors import RunDirectoryError


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
        self._path = path
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _epoch(line) < start_epoch]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(path)
        except OSError as error:
            raise _refused(path, error) from error

    def write(self, metrics: EpochMetrics) -> None:
        """Append one line; numbers that JSON does not know (NaN, infinity) become null."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(_jsonable(asdict(metrics))) + "\n")
        except OSError as error:
            raise _refused(self._path, error) from error


def _refused(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} cannot be written: {error.strerror}; free space or choose another run_dir"
    )


def _epoch(line: str) -> float:
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut off


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
