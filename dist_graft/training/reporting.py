"""What a run tells while it goes on: metrics file, TensorBoard, log. Never communicates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.monitoring.console import NetworkRow, epoch_text, summary_text
from dist_graft.monitoring.metrics import EpochMetrics, MetricsFile
from dist_graft.monitoring.tensorboard import LayerView, NetworkBoard, PopulationBoard
from dist_graft.population.grafter import GraftRecord
from dist_graft.training.run_directory import RunDirectory


class Reporter:
    """Writes what one network and, in the first process, the population did.

    Args:
        config: of the run.
        directory: of the run.
        network: of this process.
        speaks: whether this process reports on the population.
        start_epoch: first epoch to be reported; what is there from it on is dropped.
        log: of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        *,
        network: int,
        speaks: bool,
        start_epoch: int,
        log: logging.Logger,
    ) -> None:
        self._config = config
        self._log = log
        folder = directory.network(network)
        self._metrics = MetricsFile(folder / "metrics.jsonl", start_epoch=start_epoch)
        self._board: NetworkBoard | None = None
        self._population: PopulationBoard | None = None
        if config.monitor.tensorboard:
            self._board = NetworkBoard(folder, start_epoch=start_epoch)
            if speaks:
                self._population = PopulationBoard(directory.population, start_epoch=start_epoch)

    def network(self, metrics: EpochMetrics, layers: LayerView) -> None:
        """Report one epoch of this process's network."""
        self._metrics.write(metrics)
        if self._board:
            self._board.epoch(metrics, layers)

    def population(self, epoch: int, seconds: float, everyone: Sequence[NetworkRow]) -> None:
        """Report one epoch of all networks."""
        self._log.info("%s", epoch_text(epoch, self._config.epochs, seconds, everyone))
        if self._population:
            self._population.epoch(epoch, [row.test_accuracy for row in everyone])

    def summary(self, summary: dict[str, Any], network: int) -> None:
        """Report the end of the run."""
        epoch = self._config.epochs - 1
        if self._board:
            after = summary["networks"][network]["accuracy_after_last_round"]
            self._board.after_last_round(after, epoch)
        if self._population:
            for when in ("before_last_round", "after_last_round"):
                self._population.ensemble(when, summary[f"ensemble_accuracy_{when}"], epoch)
        self._log.info("%s", summary_text(summary))

    def close(self) -> None:
        """Flush and close all files."""
        for board in (self._board, self._population):
            if board:
                board.close()


def row_of(metrics: EpochMetrics) -> NetworkRow:
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
    )


def with_round(earlier: dict[str, Any] | None, record: GraftRecord) -> dict[str, Any]:
    """The rounds of one epoch for metrics.jsonl: the last one, with the time and bytes of all."""
    before = earlier or {"rounds": 0, "seconds": 0.0, "phase_seconds": {}, "bytes": 0}
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
    }
