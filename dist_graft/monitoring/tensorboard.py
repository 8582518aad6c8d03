"""TensorBoard: one directory a network with the same tags, and one for the population."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.metrics import EpochMetrics


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What one network's layers hold before the round, by graft unit."""

    criterion: str
    information: Mapping[str, float]
    invalid: Mapping[float, Mapping[str, int]]
    """Number of filters below each threshold."""


def _told_by_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """The event writer's thread hands a disk's error on; only what is not one is printed."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class _Events:
    """An event file; a disk that refuses is an error of the run, also when it does so later."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self._folder = folder
        threading.excepthook = _told_by_the_main_thread
        with self._told():
            self._writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number; it may reach the disk later."""
        with self._told():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text; it may reach the disk later."""
        with self._told():
            self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Have all that was written reach the disk."""
        with self._told():
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        with self._told():
            self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"events in {self._folder} cannot be written: {error.strerror}; free space or "
                "choose another run_dir"
            ) from error


class NetworkBoard:
    """Events of one network; steps are epochs, counted from 0.

    Args:
        folder: of the network.
        start_epoch: of a resumed run; what older files hold from there on is dropped by readers.
    """

    def __init__(self, folder: Path, *, start_epoch: int) -> None:
        self._events = _Events(folder, start_epoch)

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
                self._events.scalar(tag, scalar, metrics.epoch)
        self._events.flush()

    def after_last_round(self, accuracy: float, epoch: int) -> None:
        """Write the test accuracy that the last round left."""
        self._events.scalar("final/test_accuracy_after_last_round", accuracy, epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._events.close()


class PopulationBoard:
    """Events of the population as a whole, written by one process."""

    def __init__(self, folder: Path, *, start_epoch: int) -> None:
        self._events = _Events(folder, start_epoch)

    def epoch(self, epoch: int, test_accuracy: Sequence[float]) -> None:
        """Write mean and spread of the networks' test accuracies (before the round)."""
        spread = statistics.stdev(test_accuracy) if len(test_accuracy) > 1 else 0.0
        for name, value in (
            ("mean", statistics.fmean(test_accuracy)),
            ("min", min(test_accuracy)),
            ("max", max(test_accuracy)),
            ("standard_deviation", spread),
        ):
            self._events.scalar(f"population/test_accuracy_{name}", value, epoch)
        self._events.flush()

    def event(self, text: str, epoch: int) -> None:
        """Write what happened in an epoch beside the training."""
        self._events.text("events", text, epoch)
        self._events.flush()

    def ensemble(self, tag: str, accuracy: float, epoch: int) -> None:
        """Write the accuracy of the members' mean probability."""
        self._events.scalar(f"final/ensemble_test_accuracy_{tag}", accuracy, epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._events.close()
