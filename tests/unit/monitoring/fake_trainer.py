"""A trainer that stands still, and reports: what callbacks of monitoring look at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from dist_graft import Graft, Trainer
from dist_graft.config import TrainConfig
from dist_graft.config.members import member_config
from dist_graft.monitoring.metrics import EpochMetrics, EpochReport, LayerStats, NetworkRow
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory
from dist_graft.training.schedule import Cadence
from dist_graft.training.task import classification

LAYERS = LayerStats(
    criterion="entropy",
    information={"conv1": 1.5, "conv2": 2.0},
    invalid={0.1: {"conv1": 3, "conv2": 4}, 0.01: {"conv1": 1, "conv2": 0}},
)


@dataclass
class FakeTrainer:
    """Position and surroundings of a trainer, to be changed by a test."""

    run_dir: Path
    config: TrainConfig = field(default_factory=TrainConfig)
    process: ProcessInfo = field(default_factory=ProcessInfo)
    epoch: int = 0
    step: int = 0
    round: int = 0
    steps_per_epoch: int = 4
    cadence: Cadence = field(default_factory=lambda: Cadence(every_epochs=1))
    summary: dict[str, Any] = field(default_factory=dict)
    resumed_from: Path | None = None
    grafter: object = None
    criterion: str = "entropy"
    max_lr: float = 0.25
    model_name: str = "resnet20"
    custom: Sequence[str] = ()
    lease_lost: bool = False
    stop_requests: object = None

    def __post_init__(self) -> None:
        self.member_config = member_config(self.config, self.process.network)
        self.directory = RunDirectory(self.run_dir)
        for folder in (self.directory.network(self.process.network), self.directory.population):
            folder.mkdir(parents=True, exist_ok=True)
        self.directory.write_config(self.config, self.process.networks)
        self.log = logging.getLogger("fake_trainer")
        self.log.setLevel(logging.DEBUG)
        self.device = torch.device("cpu")
        self.task = classification()
        self.data = SimpleNamespace(has_validation=False, train_size=35)
        self.hosts = [f"host{network}" for network in range(self.process.networks)]

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def trainer(self) -> Trainer:
        """Itself, as the hooks want it."""
        return cast(Trainer, self)


def epoch_metrics(epoch: int, **values: Any) -> EpochMetrics:
    fields: dict[str, Any] = {
        "lr": 0.5,
        "train": {"loss": 2.5, "accuracy": 12.5},
        "test": {"loss": 2.25, "accuracy": 25.0},
        "images_per_second": 100.0,
        "phase_seconds": {"step": 3.0, "other": 1.0},
        "information": dict(LAYERS.information),
        "graft": None,
    }
    return EpochMetrics(epoch=epoch, **{**fields, **values})


def network_row(**values: float) -> NetworkRow:
    return NetworkRow(
        **{
            **{"lr": 0.05, "train_loss": 1.23456, "train_metric": 45.678, "test_loss": 2.5},
            **{"test_metric": 40.0, "images_per_second": 1234.5, "donor": -1.0},
            **{"min_coefficient": 1.0, "max_coefficient": 1.0, "busy_seconds": 7.5},
            **{"epoch_seconds": 8.25, "finite": 1.0, **values},
        }
    )


def epoch_report(
    metrics: EpochMetrics, *, networks: Sequence[NetworkRow] = (), ensemble: float | None = None
) -> EpochReport:
    return EpochReport(
        metrics=metrics,
        layers=LAYERS,
        networks=networks or [network_row()],
        metric="accuracy",
        ensemble_accuracy=ensemble,
        seconds=3.21,
    )


def graft_record(round_: int, **values: Any) -> GraftRecord:
    """A round of two networks."""
    fields: dict[str, Any] = {
        **{"round": round_, "network": 0, "donor": 1, "coefficient": {"conv1": 0.5, "conv2": 0.5}},
        **{"information": {}, "distance": {}, "seconds": 1.0, "phase_seconds": {}},
        **{"bytes_received": 0, "diverged": {}, "healed": {}},
        "mixing": Graft().decide(torch.zeros(2, 2, dtype=torch.float64), 0),
    }
    return GraftRecord(**{**fields, **values})
