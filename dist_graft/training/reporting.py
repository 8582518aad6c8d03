"""What a run tells while it goes on: metrics file, TensorBoard, log. Never communicates."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.console import NetworkRow, epoch_text, summary_text
from dist_graft.monitoring.metrics import EpochMetrics, MetricsFile
from dist_graft.monitoring.run_events import Event, RunEventsFile
from dist_graft.monitoring.tensorboard import LayerView
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.boards import Boards
from dist_graft.training.checkpoint.files import write_atomically
from dist_graft.training.loop import EvalResult, TrainResult
from dist_graft.training.run_directory import RunDirectory
from dist_graft.training.schedule import Position

SLOW = 2.0
"""A network is slow that is busy so many times longer than its peers' median."""
_SHORT_SECONDS = 1.0  # epochs in which a hiccup makes the difference


class Reporter:
    """Writes what one network and, in the first process, the population did.

    Of several processes that train a network only the first writes.

    A disk that refuses in the middle of a run is a warning, and the numbers are written later.

    Args:
        config: of the run.
        directory: of the run.
        process: this process.
        start: where this start of the run begins; what is there from it on is dropped.
        hosts: of each network.
        log: of this process.

    Raises: RunDirectoryError when the disk refuses from the start.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        process: ProcessInfo,
        *,
        start: Position,
        hosts: Sequence[str],
        log: logging.Logger,
    ) -> None:
        self._config = config
        self._directory = directory
        self._process = process
        self._log = log
        self._unwritten: RunDirectoryError | None = None
        self._slow: set[int] = set()
        self._diverged: set[int] = set()
        folder = directory.network(process.network)
        self._metrics: MetricsFile | None = None
        if process.is_leader:
            self._metrics = MetricsFile(folder / "metrics.jsonl", start_epoch=start.epoch)
        self._story: RunEventsFile | None = None
        if process.rank == 0:
            self._story = RunEventsFile(
                directory.events, start_epoch=start.epoch, start_round=start.round
            )
        self._boards = Boards(
            config,
            directory,
            process,
            start_epoch=start.epoch,
            lines=self._metrics.kept if self._metrics else [],
            hosts=hosts,
            log=log,
        )
        if self._story:
            self._boards.story(self._story.events, start.epoch)

    def resumed(self, path: Path, start: Position) -> None:
        """Report from where the run goes on."""
        self._tell(
            Event(
                kind="resumed",
                epoch=start.epoch,
                round=start.round,
                network=None,
                text=f"went on from {path}",
            ),
            logging.DEBUG,  # who loaded it has logged it
        )

    def round(self, epoch: int, record: GraftRecord) -> None:
        """Report a round, and the networks that it found to have diverged."""
        self._boards.round(record)
        for network, what in record.diverged.items():
            if network in record.healed:
                self._tell(
                    Event(
                        kind="healed",
                        epoch=epoch,
                        round=record.round,
                        network=network,
                        text=f"network {network} has {what}: it took the weights of network "
                        f"{record.healed[network]} whole, and its optimizer starts anew",
                    )
                )
            elif network not in self._diverged:
                self._tell(
                    Event(
                        kind="diverged",
                        epoch=epoch,
                        round=record.round,
                        network=network,
                        text=f"network {network} has {what}: from here on nobody takes from it",
                    )
                )
        self._diverged = set(record.diverged) - set(record.healed)

    def network(self, metrics: EpochMetrics, layers: LayerView) -> None:
        """Report one epoch of this process's network."""
        if self._metrics is None:
            return
        if self._metrics.vanished:
            self._make_anew()
        with self._enduring():
            self._metrics.write(metrics)
        self._boards.network(metrics, layers)

    def population(
        self,
        epoch: int,
        round_: int,
        seconds: float,
        everyone: Sequence[NetworkRow],
        ensemble: float | None,
    ) -> None:
        """Report one epoch of all networks; the accuracy of their ensemble, if it is known."""
        self._log.info("%s", epoch_text(epoch, self._config.epochs, seconds, everyone))
        self._boards.population(epoch, [row.test_accuracy for row in everyone], ensemble)
        slow = slow_networks(everyone)
        for network in sorted(set(slow) - self._slow):
            self._tell(
                Event(
                    kind="slow",
                    epoch=epoch,
                    round=round_,
                    network=network,
                    text=f"network {network} is slow: its epoch took "
                    f"{everyone[network].busy_seconds:.1f} s, {slow[network]:.1f} times what the "
                    "others took; they wait for it",
                )
            )
        self._slow = set(slow)

    def skipped(self, epoch: int, skipped: Mapping[str, str]) -> None:
        """Warn of the images that this process's network has left out so far; path to reason."""
        if skipped:
            first, reason = next(iter(skipped.items()))
            self._log.warning(
                "epoch %d: broken images left out so far: %d, the first is %s (%s)",
                epoch,
                len(skipped),
                first,
                reason,
            )

    def summary(self, summary: dict[str, Any]) -> None:
        """Report the end of the run; the first process writes summary.json."""
        if self._story:
            summary = summary | {"events": self._story.events}
            text = json.dumps(summary, indent=1) + "\n"
            try:
                write_atomically(self._directory.summary, text.encode())
            except RunDirectoryError as error:
                self._unwritten = error
        self._boards.summary(summary)
        self._log.info("%s", summary_text(summary))

    def close(self) -> None:
        """Flush and close all files."""
        self._boards.close()

    def finish(self) -> None:
        """Raise RunDirectoryError when summary.json could not be written."""
        if self._unwritten:
            raise self._unwritten

    def _make_anew(self) -> None:
        """The run directory is gone, in the middle of the run."""
        self._log.warning(
            "%s has vanished: it is made anew without what it held, and training goes on",
            self._directory.path,
        )
        with self._enduring():
            if self._process.rank == 0:
                self._directory.describe(self._config, self._process.networks)
        self._boards.open_anew()

    def _tell(self, event: Event, level: int = logging.WARNING) -> None:
        self._log.log(level, "epoch %d: %s", event.epoch + 1, event.text)
        if self._story:
            with self._enduring():
                self._story.write(event)
            self._boards.story(self._story.events, event.epoch)

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        try:
            yield
        except RunDirectoryError as error:
            self._log.warning("%s; training goes on", error)


def slow_networks(everyone: Sequence[NetworkRow]) -> dict[int, float]:
    """Networks that keep the others waiting, and how many times longer than these they are busy."""
    found: dict[int, float] = {}
    if not all(row.epoch_seconds for row in everyone):
        return found
    for network, row in enumerate(everyone):
        others = [other.busy_seconds for other in everyone if other is not row]
        usual = statistics.median(others) if others else 0.0
        if row.busy_seconds > max(SLOW * usual, _SHORT_SECONDS) and usual > 0:
            found[network] = row.busy_seconds / usual
    return found


def epoch_metrics(
    epoch: int,
    lr: float,
    trained: TrainResult,
    tested: EvalResult,
    validated: EvalResult | None,
    rounds: dict[str, Any] | None,
    layers: LayerView,
    phase_seconds: dict[str, float],
) -> EpochMetrics:
    """One epoch of one network, as metrics.jsonl tells of it."""
    return EpochMetrics(
        epoch=epoch,
        lr=lr,
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        test_loss=tested.loss,
        test_accuracy=tested.accuracy,
        val_loss=validated.loss if validated else None,
        val_accuracy=validated.accuracy if validated else None,
        images_per_second=trained.images / trained.seconds,
        phase_seconds=phase_seconds,
        information=dict(layers.information),
        graft=rounds,
    )


def row_of(metrics: EpochMetrics, *, busy: float, whole: float, sound: bool) -> NetworkRow:
    """What the others hear of one network's epoch."""
    graft = metrics.graft or {"donor": -1, "coefficient": {"": 1.0}}
    return NetworkRow(
        lr=metrics.lr,
        train_loss=metrics.train_loss,
        train_accuracy=metrics.train_accuracy,
        test_loss=metrics.test_loss,
        test_accuracy=metrics.test_accuracy,
        images_per_second=metrics.images_per_second,
        donor=graft["donor"],
        smallest_coefficient=min(graft["coefficient"].values()),
        largest_coefficient=max(graft["coefficient"].values()),
        busy_seconds=busy,
        epoch_seconds=whole,
        sound=float(sound),
    )


def with_round(earlier: dict[str, Any] | None, record: GraftRecord) -> dict[str, Any]:
    """The rounds of one epoch for metrics.jsonl: the last one, with the time and bytes of all."""
    before = earlier or {"rounds": 0, "seconds": 0.0, "phase_seconds": {}, "bytes": 0}
    healed_from = record.healed.get(record.network, before.get("healed_from"))
    return {
        "round": record.round,
        "rounds": before["rounds"] + 1,
        "donor": record.donor,
        "seconds": before["seconds"] + record.seconds,
        "phase_seconds": {
            phase: before["phase_seconds"].get(phase, 0.0) + seconds
            for phase, seconds in record.phase_seconds.items()
        },
        "bytes": before["bytes"] + record.bytes_received,
        "coefficient": record.coefficient,
        "information": record.information,
        "distance": record.distance,
        "healed_from": healed_from,
    }
