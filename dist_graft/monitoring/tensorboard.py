"""TensorBoard: one directory a network with the same tags, and one for the population."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_graft.grafting.mixing import Mixing
from dist_graft.monitoring.chart_layout import Layout
from dist_graft.monitoring.event_file import EventFile
from dist_graft.monitoring.figures import layers_over_epochs, who_gave_to_whom
from dist_graft.monitoring.layer_history import LayerHistory
from dist_graft.monitoring.metrics import EpochMetrics

AFTER = "final/test_accuracy_after_last_round"
BEFORE = "final/test_accuracy_before_last_round"
FIRST = ("lr", "method", "model", "seed")
RESULTS = (AFTER, BEFORE, "accuracy/test")
"""What the hyperparameters' tab shows first of a network's options, and as its results."""


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
        options: the network's row in the hyperparameters' tab.
    """

    def __init__(
        self, folder: Path, *, start_epoch: int, options: Mapping[str, float | str]
    ) -> None:
        self._events = EventFile(folder, start_epoch)
        self._events.begin_session(options, first=FIRST, results=RESULTS)

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
        whole = sum(metrics.phase_seconds.values())
        for phase, seconds in metrics.phase_seconds.items():
            scalars[f"time_share/{phase}"] = 100 * seconds / whole
        scalars |= _by_unit(layers.criterion, layers.information)
        for threshold, counts in layers.invalid.items():
            scalars[f"invalid_filters_{threshold:g}"] = sum(counts.values())
            scalars |= _by_unit(f"invalid_{threshold:g}", counts, summary=False)
        if metrics.graft is not None:
            scalars["round/seconds"] = metrics.graft["seconds"]
            scalars["round/megabytes_received"] = metrics.graft["bytes"] / 1e6
            scalars |= _by_unit("coefficient", metrics.graft["coefficient"])
            distance = metrics.graft["distance"]
            scalars |= _by_unit("distance", distance, summary=False)
            if distance:
                scalars["layers/distance_to_donor"] = math.hypot(*distance.values())
        for tag, scalar in scalars.items():
            if scalar is not None:
                self._events.scalar(tag, scalar, metrics.epoch)
        self._events.flush()

    def heat_map(
        self, name: str, title: str, history: LayerHistory, *, middle: float | None = None
    ) -> None:
        """Draw all epochs so far, layer by layer, when there are any; see `layers_over_epochs`."""
        if history.epochs:
            drawn = layers_over_epochs(
                title, history.epochs, history.names, history.numbers(), middle=middle
            )
            self._events.picture(f"heat_map/{name}", drawn, history.epochs[-1])
            self._events.flush()

    def end(self, before: float, after: float, epoch: int) -> None:
        """Write the test accuracies that the last round found and left: the run is over."""
        self._events.scalar(BEFORE, before, epoch)
        self._events.scalar(AFTER, after, epoch)
        self._events.end_session()

    def close(self) -> None:
        """Flush and close the file."""
        self._events.close()


class PopulationBoard:
    """Events of the population as a whole, written by one process.

    Args:
        folder: of the population.
        start_epoch: as of `NetworkBoard`.
        layout: of the custom scalars.
        texts: what the run is, in Markdown, by tag.
    """

    def __init__(
        self, folder: Path, *, start_epoch: int, layout: Layout, texts: Mapping[str, str]
    ) -> None:
        self._events = EventFile(folder, start_epoch)
        self._events.layout(layout)
        for tag, text in texts.items():
            self._events.text(tag, text, start_epoch)
        self._events.flush()

    def epoch(self, epoch: int, test_accuracy: Sequence[float], ensemble: float | None) -> None:
        """Write mean and spread of the networks' test accuracies, and their ensemble's, if known.

        All of them before the round.
        """
        spread = statistics.stdev(test_accuracy) if len(test_accuracy) > 1 else 0.0
        for name, value in (
            ("test_accuracy_mean", statistics.fmean(test_accuracy)),
            ("test_accuracy_min", min(test_accuracy)),
            ("test_accuracy_max", max(test_accuracy)),
            ("test_accuracy_standard_deviation", spread),
            ("ensemble_test_accuracy", ensemble),
        ):
            if value is not None:
                self._events.scalar(f"population/{name}", value, epoch)
        self._events.flush()

    def round(self, number: int, names: Sequence[str], mixing: Mixing, epoch: int) -> None:
        """Draw who gave what to whom in a round of the units of these names."""
        drawn = who_gave_to_whom(
            f"round {number}",
            names,
            mixing.shares.numpy().astype(np.float64),
            mixing.donors,
        )
        self._events.picture("round/who_gave_what_to_whom", drawn, epoch)
        self._events.flush()

    def story(self, events: Sequence[Mapping[str, Any]], epoch: int) -> None:
        """Write all that happened so far beside the training, as events.jsonl has it."""
        rows = [("time", "epoch, from 0", "what", "happened")]
        rows += [("---",) * 4]
        rows += [
            (event["time"], str(event["epoch"]), event["kind"], event["text"]) for event in events
        ]
        self._events.text("run/story", "\n".join(f"| {' | '.join(row)} |" for row in rows), epoch)
        self._events.flush()

    def ensemble(self, tag: str, accuracy: float, epoch: int) -> None:
        """Write the accuracy of the members' mean probability."""
        self._events.scalar(f"final/ensemble_test_accuracy_{tag}", accuracy, epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._events.close()


def _by_unit(
    name: str, values: Mapping[str, float | None], *, summary: bool = True
) -> dict[str, float | None]:
    """A scalar for each graft unit and, when wanted, mean, smallest and largest of them."""
    scalars = {f"{name}/{unit}": value for unit, value in values.items()}
    known = [value for value in values.values() if value is not None]
    if known and summary:
        scalars[f"layers/{name}_mean"] = statistics.fmean(known)
        scalars[f"layers/{name}_min"] = min(known)
        scalars[f"layers/{name}_max"] = max(known)
    return scalars
