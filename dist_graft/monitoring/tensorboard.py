"""TensorBoard: one directory a network with the same tags, and one for the population."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dist_graft.monitoring.metrics import EpochMetrics


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What one network's layers hold before the round, by graft unit."""

    criterion: str
    information: Mapping[str, float]
    invalid: Mapping[float, Mapping[str, int]]
    """Number of filters below each threshold."""


class NetworkBoard:
    """Events of one network; steps are epochs, counted from 0.

    Args:
        folder: of the network.
        start_epoch: of a resumed run; what older files hold from there on is dropped by readers.
    """

    def __init__(self, folder: Path, *, start_epoch: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def epoch(self, metrics: EpochMetrics, layers: LayerView) -> None:
        """Write what an epoch and its round gave."""
        scalars: dict[str, float | None] = {
            "loss/train": metrics.train_loss,
            "loss/test": metrics.test_loss,
            "loss/val": metrics.val_loss,
            "accuracy/train": metrics.train_accuracy,
            "accuracy/test": metrics.test_accuracy,
            "accuracy/val": metrics.val_accuracy,
            "learning_rate": metrics.lr,
            "images_per_second": metrics.images_per_second,
        }
        for unit, value in layers.information.items():
            scalars[f"{layers.criterion}/{unit}"] = value
        for threshold, counts in layers.invalid.items():
            scalars[f"invalid_filters_{threshold:g}"] = sum(counts.values())
            for unit, count in counts.items():
                scalars[f"invalid_{threshold:g}/{unit}"] = count
        if metrics.graft is not None:
            scalars["round/seconds"] = metrics.graft["seconds"]
            scalars["round/megabytes_received"] = metrics.graft["bytes"] / 1e6
            for name in ("coefficient", "distance"):
                for unit, value in metrics.graft[name].items():
                    scalars[f"{name}/{unit}"] = value
        for tag, scalar in scalars.items():
            if scalar is not None:
                self._writer.add_scalar(tag, scalar, metrics.epoch)
        self._writer.flush()

    def after_last_round(self, accuracy: float, epoch: int) -> None:
        """Write the test accuracy that the last round left."""
        self._writer.add_scalar("final/test_accuracy_after_last_round", accuracy, epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class PopulationBoard:
    """Events of the population as a whole, written by one process."""

    def __init__(self, folder: Path, *, start_epoch: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def epoch(self, epoch: int, test_accuracy: Sequence[float]) -> None:
        """Write mean and spread of the networks' test accuracies (before the round)."""
        spread = statistics.stdev(test_accuracy) if len(test_accuracy) > 1 else 0.0
        for name, value in (
            ("mean", statistics.fmean(test_accuracy)),
            ("min", min(test_accuracy)),
            ("max", max(test_accuracy)),
            ("standard_deviation", spread),
        ):
            self._writer.add_scalar(f"population/test_accuracy_{name}", value, epoch)
        self._writer.flush()

    def ensemble(self, tag: str, accuracy: float, epoch: int) -> None:
        """Write the accuracy of the members' mean probability."""
        self._writer.add_scalar(f"final/ensemble_test_accuracy_{tag}", accuracy, epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
