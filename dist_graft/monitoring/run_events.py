"""What happened to a run beside its training, one JSON line an event."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dist_graft.monitoring.jsonl import JsonLinesFile

Kind = Literal["resumed", "diverged", "healed", "slow"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    kind: Kind
    epoch: int
    """0-based."""
    round: int
    """Rounds finished before it."""
    network: int | None
    """Whom it happened to; None: to all."""
    text: str
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class RunEventsFile:
    """Appends to events.jsonl. A resumed run forgets what it will live through again.

    Args:
        path: of the file; its folder exists.
        start_epoch: first epoch of this start of the run.
        start_round: rounds that were finished at its start.

    Raises: RunDirectoryError when the disk refuses.
    """

    def __init__(self, path: Path, *, start_epoch: int, start_round: int) -> None:
        def stays(event: dict[str, Any]) -> bool:
            over = event["epoch"] < start_epoch or event["round"] < start_round
            return bool(over or event["kind"] == "resumed")

        self._lines = JsonLinesFile(path, keep=stays)
        self.events: list[dict[str, Any]] = self._lines.kept

    def write(self, event: Event) -> None:
        """Append one event.

        Raises: RunDirectoryError when the disk refuses; the next call writes it too.
        """
        self.events.append(asdict(event))
        self._lines.write(asdict(event))
