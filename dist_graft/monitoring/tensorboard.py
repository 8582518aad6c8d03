"""TensorBoard: one directory per network with the same tags, and one for the population."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_graft.config import TrainConfig
from dist_graft.config.members import differing_options
from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.chart_layout import custom_scalars, with_unit
from dist_graft.monitoring.event_file import EventFile
from dist_graft.monitoring.figures import flow_of_round, layers_over_epochs
from dist_graft.monitoring.jsonl import read_json_lines
from dist_graft.monitoring.layer_history import (
    LayerHistory,
    Pacing,
    coefficients,
    informations,
)
from dist_graft.monitoring.metrics import MOMENTS, EpochReport
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.monitoring.scalars import (
    final_network_scalars,
    final_population_scalars,
    network_scalars,
    population_scalars,
)
from dist_graft.printing import markdown_table
from dist_graft.version import versions

if TYPE_CHECKING:
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.training.trainer import Trainer

HPARAMS_FIRST = ("lr", "method", "model", "seed")
"""Columns that the HParams tab shows first."""


class TensorBoard(Callback):
    """Writes the events of one network and, on rank 0, those of the population.

    On a disk error, the events of the epoch are dropped with a warning, and new event files are
    opened in the next epoch.

    Args:
        run_events: source of the events in the population's text tab.
    """

    def __init__(self, run_events: RunEvents) -> None:
        self._run_events = run_events
        self._network: EventFile | None = None
        self._population: EventFile | None = None
        self._record: GraftRecord | None = None
        self._failed_epoch: int | None = None
        self._events_shown = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        config, start = trainer.config, trainer.epoch
        path = trainer.directory.metrics(trainer.process.network)
        lines = [line for line in read_json_lines(path) if line.get("epoch", start) < start]
        self._coefficients = LayerHistory(lines, coefficients)
        self._informations = LayerHistory(lines, informations)
        self._pacing = Pacing(config.epochs)
        self._criterion = trainer.criterion
        self._metric = next(iter(trainer.task.metrics), "loss")
        self._folder = trainer.directory.network(trainer.process.network)
        self._open(trainer, start)
        self._show_events(trainer, start)

    def on_round_end(self, trainer: Trainer, record: GraftRecord) -> None:
        self._record = record
        self._show_events(trainer, trainer.epoch)

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        line = report.metrics.to_json()
        self._coefficients.add(line)
        self._informations.add(line)
        self._write(trainer, report.metrics.epoch, lambda: self._write_epoch(report))
        self._show_events(trainer, report.metrics.epoch)
        self._record = None

    def on_fit_end(self, trainer: Trainer) -> None:
        if summary := trainer.summary:
            network = trainer.process.network
            self._write(
                trainer, trainer.config.epochs - 1, lambda: self._write_summary(summary, network)
            )

    def teardown(self, trainer: Trainer) -> None:
        for file in (self._network, self._population):
            if file:
                try:
                    file.close()
                except RunDirectoryError as error:
                    trainer.log.warning("%s; training continues", error)

    def _write_epoch(self, report: EpochReport) -> None:
        epoch = report.metrics.epoch
        if self._network:
            self._network.scalars(network_scalars(report.metrics, report.layers), epoch)
            if self._pacing.due(epoch):
                with self._pacing.drawing():
                    self._draw(epoch, self._network)
        if self._population:
            self._population.scalars(population_scalars(report), epoch)

    def _write_summary(self, summary: Mapping[str, Any], network: int) -> None:
        epoch = self._pacing.epochs - 1
        if self._network:
            self._network.scalars(final_network_scalars(summary, network), epoch)
            self._network.end_session()
        if self._population:
            self._population.scalars(final_population_scalars(summary), epoch)

    def _show_events(self, trainer: Trainer, epoch: int) -> None:
        """Write a table of all events so far, if there are new ones."""
        events = self._run_events.events
        if self._population and len(events) > self._events_shown:
            self._write(trainer, epoch, lambda: self._write_events(events, epoch))

    def _write_events(self, events: Sequence[Mapping[str, Any]], epoch: int) -> None:
        if self._population:
            rows = [
                (event["time"], str(event["epoch"]), event["kind"], event["text"])
                for event in events
            ]
            table = markdown_table(("time", "epoch, from 0", "kind", "event"), rows)
            self._population.texts({"run/events": table}, epoch)
            self._events_shown = len(events)

    def _draw(self, epoch: int, file: EventFile) -> None:
        """Draw all epochs so far, layer by layer, and which network gave how much to which."""
        information = f"information of the layers ({with_unit(self._criterion)})"
        for name, title, history, middle in (
            ("coefficient", "coefficient: share of its own weights kept", self._coefficients, 0.5),
            (self._criterion, information, self._informations, None),
        ):
            if history.epochs:
                drawn = layers_over_epochs(
                    title, history.epochs, history.names, history.numbers(), middle=middle
                )
                file.image(f"heat_map/{name}", drawn, history.epochs[-1])
        if self._population and (record := self._record):
            shares = record.mixing.shares.numpy().astype(np.float64)
            title, names = f"round {record.round}", list(record.coefficient)
            drawn = flow_of_round(title, names, shares, record.mixing.donors)
            self._population.image("round/who_gave_what_to_whom", drawn, epoch)

    def _open(self, trainer: Trainer, epoch: int) -> None:
        process = trainer.process
        self._network = EventFile(self._folder, epoch)
        final = [f"final/test_{self._metric}_{moment}" for moment in reversed(MOMENTS)]
        self._network.begin_session(
            hparams(
                *(trainer.member_config, trainer.max_lr, process.networks),
                differing=differing_options(trainer.config),
                own={
                    part: trainer.model_name if part == "model" else "custom"
                    for part in trainer.custom
                },
            ),
            first=HPARAMS_FIRST,
            results=(*final, f"{self._metric}/test"),
        )
        if process.is_main and trainer.directory.job is None:
            hosts = ((str(network), host) for network, host in enumerate(trainer.hosts))
            texts = {
                "run/configuration": f"```\n{trainer.directory.config.read_text()}```",
                "run/versions": markdown_table(("what", "version"), versions().items()),
                "run/hosts": markdown_table(("network", "host"), hosts),
            }
            layout = custom_scalars(
                self._criterion,
                validation=trainer.data.has_validation,
                rounds=trainer.grafter is not None,
                metric=self._metric,
            )
            self._population = EventFile(trainer.directory.population, epoch)
            self._population.layout(layout)
            self._population.texts(texts, epoch)

    def _write(self, trainer: Trainer, epoch: int, write: Callable[[], object]) -> None:
        """Write events, into new files if an earlier epoch had a disk error."""
        if self._failed_epoch == epoch:
            return
        try:
            has_files = any(self._folder.glob("events.out.tfevents.*"))
            if self._failed_epoch is not None or not has_files:
                self._open(trainer, epoch)
                self._failed_epoch = None
            write()
        except RunDirectoryError as error:
            self._failed_epoch = epoch
            trainer.log.warning("%s; the events of epoch %d are lost", error, epoch + 1)


def hparams(
    config: TrainConfig,
    lr: float,
    networks: int,
    *,
    differing: Sequence[str] = (),
    own: Mapping[str, str] | None = None,
) -> dict[str, float | str]:
    """Columns of the HParams tab that distinguish networks and runs.

    Args:
        config: all options, with those of the network (`member_config`).
        lr: initial learning rate of the network.
        networks: size of the population.
        differing: names of the options in which networks differ.
        own: names of the data, model and optimizer that were given in Python.
    """
    options: dict[str, float | str] = {
        "networks": networks,
        "lr": lr,
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
    own = own or {}
    options |= {column: name for column, name in own.items() if column in options}
    if "optimizer" in own:
        del options["weight_decay"]
    for name in differing:
        section, _, option = name.partition(".")
        value = getattr(getattr(config, section), option)
        column = {"optim.name": "optimizer"}.get(name, option)
        if column != "lr":
            options[column] = value if isinstance(value, (bool, int, float)) else str(value)
    return options
