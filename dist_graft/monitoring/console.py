"""Progress on a terminal, and tables of the population as text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from tqdm import tqdm

from dist_graft.printing import format_table as table

__all__ = ["NetworkRow", "ProgressBar", "duration", "epoch_text", "summary_text", "table"]


def duration(seconds: float) -> str:
    """A length of time, in the two largest units that matter."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


class ProgressBar:
    """A bar over an epoch's steps on a terminal; nothing where lines are wanted (a log, a pipe).

    Args:
        mode: auto shows it on a terminal only.
        show: whether this process is the one that shows it.
    """

    def __init__(self, mode: Literal["auto", "bar", "lines"], *, show: bool) -> None:
        self._shown = show and (mode == "bar" or (mode == "auto" and sys.stderr.isatty()))
        self._bar: tqdm[Any] | None = None
        self._left: Callable[[], float | None] = lambda: None

    def start(
        self,
        *,
        steps: int,
        epoch: int,
        epochs: int,
        done: int = 0,
        left: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Begin an epoch (0-based) of so many steps, of which some are done.

        Args:
            steps: of an epoch.
            epoch: its number.
            epochs: of the run.
            done: steps that were taken earlier.
            left: seconds until the run ends, if that can be told.
        """
        self.stop()
        if not self._shown:
            return
        self._left = left
        with contextlib.suppress(OSError):  # a terminal that has hung up
            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=f"epoch {epoch + 1}/{epochs}",
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, "
                "{rate_noinv_fmt}{postfix}",
                unit="step",
                leave=False,
                dynamic_ncols=True,
            )

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None:
            if (seconds := self._left()) is not None:
                self._bar.set_postfix_str(f"{duration(seconds)} left", refresh=False)
            with contextlib.suppress(OSError):
                self._bar.update()

    def stop(self) -> None:
        """The epoch's training is over, or is left; the last step shows, however quick it was."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.refresh()
                self._bar.close()
            self._bar = None


@dataclass(frozen=True)
class NetworkRow:
    """What the population's table says of one network in one epoch; only numbers, to be sent."""

    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    images_per_second: float
    donor: float
    """Network that was mixed in; -1 without a round."""
    smallest_coefficient: float
    largest_coefficient: float
    busy_seconds: float
    """Of training and evaluating, without waiting for other networks."""
    epoch_seconds: float
    """Of the whole epoch; 0 when this process did not live through all of it."""
    sound: float
    """1, or 0 when a weight or the training loss is not finite."""

    def numbers(self) -> list[float]:
        """The fields in order."""
        return list(astuple(self))


def epoch_text(epoch: int, epochs: int, seconds: float, rows: Sequence[NetworkRow]) -> str:
    """The population after an epoch (0-based), one line a network."""
    header = ("network", "lr", "train loss", "train %", "test loss", "test %", "images/s", "keeps")
    cells = [
        (
            str(network),
            f"{row.lr:.4g}",
            f"{row.train_loss:.4f}",
            f"{row.train_accuracy:.2f}",
            f"{row.test_loss:.4f}",
            f"{row.test_accuracy:.2f}",
            f"{row.images_per_second:.0f}",
            _keeps(row),
        )
        for network, row in enumerate(rows)
    ]
    return f"epoch {epoch + 1}/{epochs} ({seconds:.1f} s)\n{table(header, cells)}"


def _keeps(row: NetworkRow) -> str:
    if not row.sound:
        return "diverged"
    if row.donor < 0:
        return "all"
    low, high = row.smallest_coefficient, row.largest_coefficient
    return f"{low:.2f}-{high:.2f}, rest of {row.donor:.0f}"


def summary_text(summary: Mapping[str, Any]) -> str:
    """Final accuracies, one line a network, then mean and ensemble."""
    header = ("test accuracy, %", "before the last round", "after it")
    whens = ("accuracy_before_last_round", "accuracy_after_last_round")
    rows = [
        (f"network {row['network']} (lr {row['lr']:.4g})", *(f"{row[when]:.2f}" for when in whens))
        for row in summary["networks"]
    ]
    rows += [
        (name, *(f"{summary[f'{name}_{when}']:.2f}" for when in whens))
        for name in ("mean", "ensemble")
    ]
    return table(header, rows)
