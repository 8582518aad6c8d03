"""TensorBoard of a run, as one process writes it. Never communicates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.errors import RunDirectoryError
from dist_graft.grafting.rules.graft import Graft
from dist_graft.monitoring.chart_layout import custom_scalars, with_unit
from dist_graft.monitoring.layer_history import LayerHistory, Pacing, coefficients, informations
from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.monitoring.tensorboard import LayerView, NetworkBoard, PopulationBoard
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.builders import build_cadence, grafts_itself
from dist_graft.training.learning_rates import learning_rates
from dist_graft.training.run_directory import RunDirectory
from dist_graft.version import versions

_NEVER = -1
"""An epoch that no events are of."""


class Boards:
    """The board of one network and, in the first process, the population's.

    A disk that refuses is a warning: the events of the epoch are lost, and the boards are opened
    anew in the next one.

    Args:
        config: of the run; without monitor.tensorboard nothing is written.
        directory: of the run, with its config.yaml.
        process: this process.
        start_epoch: first epoch of this start of the run; events from it on are dropped.
        lines: of the network's metrics.jsonl, of the epochs before.
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
        start_epoch: int,
        lines: Sequence[Mapping[str, Any]],
        hosts: Sequence[str],
        log: logging.Logger,
    ) -> None:
        self._config = config
        self._directory = directory
        self._process = process
        self._hosts = hosts
        self._configuration = directory.config.read_text() if process.rank == 0 else ""
        self._log = log
        self._network: NetworkBoard | None = None
        self._population: PopulationBoard | None = None
        self._coefficients = LayerHistory(lines, coefficients)
        self._informations = LayerHistory(lines, informations)
        self._record: GraftRecord | None = None
        self._lost: int | None = None
        self._pacing = Pacing(config.epochs)
        self._criterion = Graft(criterion=config.graft.criterion).measured
        self._open(start_epoch)

    def round(self, record: GraftRecord) -> None:
        """Keep the last round of the epoch, to be drawn."""
        self._record = record

    def network(self, metrics: EpochMetrics, layers: LayerView) -> None:
        """Show one epoch of this process's network, and what is due to be drawn."""
        line = asdict(metrics)
        self._coefficients.add(line)
        self._informations.add(line)
        self._show(metrics.epoch, lambda: self._show_network(metrics, layers))
        self._record = None

    def population(self, epoch: int, accuracies: Sequence[float], ensemble: float | None) -> None:
        """Show one epoch of all networks."""
        self._show(epoch, lambda: self._show_population(epoch, accuracies, ensemble))

    def story(self, events: Sequence[Mapping[str, Any]], epoch: int) -> None:
        """Show all that happened so far beside the training."""
        if events:
            self._show(epoch, lambda: self._show_story(events, epoch))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Show the end of the run."""
        self._show(self._config.epochs - 1, lambda: self._show_summary(summary))

    def close(self) -> None:
        """Flush and close all files."""
        for board in (self._network, self._population):
            if board:
                try:
                    board.close()
                except RunDirectoryError as error:
                    self._log.warning("%s; training goes on", error)

    def _show_network(self, metrics: EpochMetrics, layers: LayerView) -> None:
        if self._network:
            self._network.epoch(metrics, layers)
            if self._pacing.due(metrics.epoch):
                with self._pacing.drawing():
                    self._draw(metrics.epoch, self._network)

    def _show_population(
        self, epoch: int, accuracies: Sequence[float], ensemble: float | None
    ) -> None:
        if self._population:
            self._population.epoch(epoch, accuracies, ensemble)

    def _show_story(self, events: Sequence[Mapping[str, Any]], epoch: int) -> None:
        if self._population:
            self._population.story(events, epoch)

    def _show_summary(self, summary: Mapping[str, Any]) -> None:
        epoch = self._config.epochs - 1
        own = summary["networks"][self._process.network]
        whens = ("before_last_round", "after_last_round")
        if self._network:
            before, after = (own[f"accuracy_{when}"] for when in whens)
            self._network.end(before, after, epoch)
        for when in whens:
            if self._population:
                self._population.ensemble(when, summary[f"ensemble_accuracy_{when}"], epoch)

    def _draw(self, epoch: int, board: NetworkBoard) -> None:
        board.heat_map(
            "coefficient",
            "coefficient: share of its own weights kept",
            self._coefficients,
            middle=0.5,
        )
        board.heat_map(
            self._criterion,
            f"information of the layers ({with_unit(self._criterion)})",
            self._informations,
        )
        if self._population and self._record:
            names = list(self._record.coefficient)
            self._population.round(self._record.round, names, self._record.mixing, epoch)

    def _open(self, epoch: int) -> None:
        if not (self._config.monitor.tensorboard and self._process.is_leader):
            return
        config, process = self._config, self._process
        self._network = NetworkBoard(
            self._directory.network(process.network),
            start_epoch=epoch,
            options=session_options(config, process),
        )
        if process.rank == 0:
            self._population = PopulationBoard(
                self._directory.population,
                start_epoch=epoch,
                layout=custom_scalars(
                    self._criterion,
                    validation=config.data.val_fraction > 0,
                    rounds=not (
                        build_cadence(config, process.networks).never or grafts_itself(config)
                    ),
                ),
                texts={
                    "run/configuration": f"```\n{self._configuration}```",
                    "run/versions": _table("what", "version", versions()),
                    "run/hosts": _table("network", "host", dict(enumerate(self._hosts))),
                },
            )

    def open_anew(self) -> None:
        """The files are gone: what comes next goes into others."""
        self._lost = _NEVER

    def _show(self, epoch: int, write: Callable[[], object]) -> None:
        """Write events, on boards that are opened anew where an earlier epoch's were lost."""
        if self._lost == epoch:
            return
        try:
            if self._lost is not None:
                self._open(epoch)
                self._lost = None
            write()
        except RunDirectoryError as error:
            self._lost = epoch
            self._log.warning("%s; the events of epoch %d are lost", error, epoch + 1)


def session_options(config: TrainConfig, process: ProcessInfo) -> dict[str, float | str]:
    """The columns by which the hyperparameters' tab tells networks and runs apart."""
    options: dict[str, float | str] = {
        "networks": process.networks,
        "lr": learning_rates(config.optim, process.networks)[process.network],
        "seed": config.seed,
        "epochs": config.epochs,
        "method": config.method,
        "data": config.data.name,
        "batch_size": config.data.batch_size,
        "model": config.model.name,
        "optimizer": config.optim.name,
        "schedule": config.optim.schedule,
        "weight_decay": config.optim.weight_decay,
        "precision": config.runtime.precision,
    }
    if config.method == "graft":
        options |= {
            "criterion": config.graft.criterion,
            "amplitude": config.graft.amplitude,
            "sensitivity": config.graft.sensitivity,
            "every": config.graft.every,
            "every_steps": config.graft.every_steps,
        }
    return options


def _table(first: str, second: str, rows: Mapping[Any, str]) -> str:
    """In Markdown."""
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])
