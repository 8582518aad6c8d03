"""Notable events of a run: resumed, diverged, healed, slow. One JSON line per event."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.jsonl import JsonLinesFile
from dist_graft.monitoring.metrics import EpochReport, NetworkRow

if TYPE_CHECKING:
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.training.trainer import Trainer

SLOW_FACTOR = 2.0
"""A network is slow if its work takes this many times longer than the median of the others."""
_MIN_SLOW_SECONDS = 1.0  # shorter epochs vary too much


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event."""

    kind: Literal["resumed", "diverged", "healed", "slow"]
    epoch: int
    """0-based."""
    round: int
    """Rounds finished before it."""
    network: int | None
    """The network concerned; None: all."""
    text: str
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def events_file(path: Path, *, start_epoch: int, start_round: int) -> JsonLinesFile:
    """Open events.jsonl, after dropping events that a resumed run will record again.

    Args:
        path: path of the file; its folder exists.
        start_epoch: first epoch after the start or resume.
        start_round: rounds finished at the start or resume.

    Raises: RunDirectoryError on a disk error.
    """

    def stays(event: dict[str, Any]) -> bool:
        if not _is_complete(event):
            return False
        past = event["epoch"] < start_epoch or event["round"] < start_round
        return bool(past or event["kind"] == "resumed")

    return JsonLinesFile(path, keep=stays)


def _is_complete(event: dict[str, Any]) -> bool:
    """Whether a line that may have been edited has all entries of an event, of their types."""
    network = event.get("network", "")
    return (
        (network is None or isinstance(network, int))
        and all(isinstance(event.get(name), int) for name in ("epoch", "round"))
        and all(isinstance(event.get(name), str) for name in ("kind", "text", "time"))
    )


class RunEvents(Callback):
    """Logs events on every process; rank 0 writes them to events.jsonl."""

    def __init__(self) -> None:
        self._file: JsonLinesFile | None = None
        self.events: list[dict[str, Any]] = []
        """All events of the run, including those before a resume; empty except on rank 0."""
        self._slow: set[int] = set()
        self._diverged: set[int] = set()

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.process.is_main:
            self._file = events_file(
                trainer.directory.events, start_epoch=trainer.epoch, start_round=trainer.round
            )
            self.events = self._file.kept
        if trainer.resumed_from:
            event = Event(
                kind="resumed",
                epoch=trainer.epoch,
                round=trainer.round,
                network=trainer.directory.job,
                text=f"resumed from {trainer.resumed_from}",
            )
            self._add(trainer, event, logging.DEBUG)  # the trainer has logged it

    def on_round_end(self, trainer: Trainer, record: GraftRecord) -> None:
        for network, what in record.diverged.items():
            if network in record.healed:
                kind: Literal["healed", "diverged"] = "healed"
                text = (
                    f"network {network} has {what}: it copied the weights of network "
                    f"{record.healed[network]}, and its optimizer state was reset"
                )
            elif network not in self._diverged:
                kind = "diverged"
                then = "it is excluded from now on"
                if trainer.config.on_divergence == "heal":  # a job
                    own = network == trainer.process.network
                    then = "no network could heal it" if own else "its weights are not used"
                text = f"network {network} has {what}: {then}"
            else:
                continue
            event = Event(
                kind=kind, epoch=trainer.epoch, round=record.round, network=network, text=text
            )
            self._add(trainer, event)
        self._diverged = set(record.diverged) - set(record.healed)

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        slow = slow_networks(report.networks)
        for network in sorted(set(slow) - self._slow):
            text = (
                f"network {network} is slow: its epoch took "
                f"{report.networks[network].busy_seconds:.1f} s, {slow[network]:.1f} times the "
                "median of the others, which wait for it"
            )
            event = Event(
                kind="slow",
                epoch=report.metrics.epoch,
                round=trainer.round,
                network=network,
                text=text,
            )
            self._add(trainer, event)
        self._slow = set(slow)
        self._report_the_unhealed(trainer, report)

    def _report_the_unhealed(self, trainer: Trainer, report: EpochReport) -> None:
        """Report networks that diverge after the last round of a run."""
        config, cadence = trainer.config, trainer.cadence
        rounds = cadence.rounds_before(config.epochs, 0, trainer.steps_per_epoch)
        if cadence.never or trainer.round < rounds or config.on_divergence == "abort":
            return
        for network, row in enumerate(report.networks, report.first_network):
            if not row.finite and network not in self._diverged:
                event = Event(
                    kind="diverged",
                    epoch=report.metrics.epoch,
                    round=trainer.round,
                    network=network,
                    text=f"network {network} is not finite, and no round follows to heal it",
                )
                self._add(trainer, event)
                self._diverged.add(network)

    def _add(self, trainer: Trainer, event: Event, level: int = logging.WARNING) -> None:
        trainer.log.log(level, "epoch %d: %s", event.epoch + 1, event.text)
        if self._file:
            self.events.append(asdict(event))
            try:
                self._file.write(asdict(event))
            except RunDirectoryError as error:
                trainer.log.warning("%s; training continues", error)


def slow_networks(networks: Sequence[NetworkRow]) -> dict[int, float]:
    """Networks that keep the others waiting, and by which factor their work takes longer."""
    found: dict[int, float] = {}
    if not all(row.epoch_seconds for row in networks):
        return found
    for network, row in enumerate(networks):
        others = [other.busy_seconds for other in networks if other is not row]
        median = statistics.median(others) if others else 0.0
        if row.busy_seconds > max(SLOW_FACTOR * median, _MIN_SLOW_SECONDS) and median > 0:
            found[network] = row.busy_seconds / median
    return found
