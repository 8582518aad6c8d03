"""Results of one epoch: one network in detail, and a row for each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

MOMENTS = ("before_last_round", "after_last_round")
"""When the final test results are measured, as in the keys of summary.json."""


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Information and invalid filters of one network's layers before the round, by graft unit."""

    criterion: str
    information: Mapping[str, float]
    invalid: Mapping[float, Mapping[str, int]]
    """Number of filters whose L1 norm is below each threshold."""


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """Results of one network in one epoch. Accuracies are percentages."""

    epoch: int
    """0-based."""
    lr: float
    """At the start of the epoch."""
    train: Mapping[str, float]
    """"loss" and each metric."""
    test: Mapping[str, float]
    """Before the round."""
    val: Mapping[str, float] | None = None
    """None without a validation split."""
    ema_test: Mapping[str, float] | None = None
    """Of the moving average of the weights; None without one."""
    images_per_second: float
    """Speed of training."""
    phase_seconds: dict[str, float]
    """Seconds since the previous report, by phase: data, step, round, evaluation, checkpoint,
    other."""
    information: dict[str, float]
    """By graft unit, before the round, in the unit of the criterion."""
    graft: dict[str, Any] | None
    """Rounds of the epoch; None in an epoch without one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of this network that members or diversity set."""

    def to_json(self) -> dict[str, Any]:
        """One line of metrics.jsonl: train_NAME, test_NAME, val_NAME for each metric."""
        val = self.val or dict.fromkeys(self.test)
        line: dict[str, Any] = {"epoch": self.epoch, "lr": self.lr}
        for split, values in (("train", self.train), ("test", self.test), ("val", val)):
            line |= {f"{split}_{name}": value for name, value in values.items()}
        if self.ema_test is not None:
            line |= {f"ema_test_{name}": value for name, value in self.ema_test.items()}
        if self.options:
            line["options"] = dict(self.options)
        return line | {
            "images_per_second": self.images_per_second,
            "phase_seconds": self.phase_seconds,
            "information": self.information,
            "graft": self.graft,
        }


@dataclass(frozen=True)
class NetworkRow:
    """One network's row in the table of an epoch. Numbers only, so that it can be gathered."""

    lr: float
    train_loss: float
    train_metric: float
    """First metric of the task; NaN without metrics."""
    test_loss: float
    test_metric: float
    images_per_second: float
    donor: float
    """Network whose weights were mixed in; -1 without a round or a donor."""
    min_coefficient: float
    max_coefficient: float
    busy_seconds: float
    """Time spent on training and evaluation, without waiting for other networks."""
    epoch_seconds: float
    """Duration of the epoch; 0 if this process resumed in the middle of it."""
    finite: float
    """1, or 0 when a weight or the training loss is NaN or Inf."""

    def numbers(self) -> list[float]:
        """The fields, in order."""
        return list(astuple(self))


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What callbacks receive at the end of an epoch."""

    metrics: EpochMetrics
    """Results of this process's network."""
    layers: LayerStats
    """Layers of this process's network."""
    networks: Sequence[NetworkRow]
    """Results of all networks, in order; only of this one if each is an independent job."""
    metric: str | None
    """Name of the metric in `networks`: the first one of the task."""
    ensemble_accuracy: float | None
    """Percent; None when it is unknown or not a classification task."""
    seconds: float
    """Time spent on training steps."""
    first_network: int = 0
    """Number of the first network in `networks`."""


def network_row(
    metrics: EpochMetrics,
    *,
    metric: str | None,
    busy_seconds: float,
    epoch_seconds: float,
    finite: bool,
) -> NetworkRow:
    """The row of one network for the `metric` to show; see `NetworkRow` for the other values."""
    graft = metrics.graft or {"donor": None, "coefficient": {"": 1.0}}
    train, test = (
        float("nan") if metric is None else values[metric]
        for values in (metrics.train, metrics.test)
    )
    return NetworkRow(
        lr=metrics.lr,
        train_loss=metrics.train["loss"],
        train_metric=train,
        test_loss=metrics.test["loss"],
        test_metric=test,
        images_per_second=metrics.images_per_second,
        donor=-1 if graft["donor"] is None else graft["donor"],
        min_coefficient=min(graft["coefficient"].values()),
        max_coefficient=max(graft["coefficient"].values()),
        busy_seconds=busy_seconds,
        epoch_seconds=epoch_seconds,
        finite=float(finite),
    )
