"""Values of the layers over all epochs, and when to draw figures of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from dist_graft.monitoring.figures import Numbers

MAX_SHARE = 0.003
"""Share of a run's time that figures may take, not counting those of the last epoch."""
MAX_DRAWINGS = 30
"""Maximum number of times that the figures of a run are drawn."""
_FIRST_SECONDS = 1.0


class LayerHistory:
    """One value per layer and epoch.

    Args:
        lines: lines of metrics.jsonl before a resume.
        read: returns the values of the layers in a line; empty if there are none.
    """

    def __init__(
        self,
        lines: Iterable[Mapping[str, Any]],
        read: Callable[[Mapping[str, Any]], Mapping[str, float | None]],
    ) -> None:
        self._read = read
        self.epochs: list[int] = []
        self.names: list[str] = []
        self._columns: list[Mapping[str, float | None]] = []
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add the values of an epoch, if it has any."""
        numbers = self._read(line)
        if numbers:
            self.epochs.append(line["epoch"])
            self._columns.append(numbers)
            self.names = list(numbers) if len(numbers) > len(self.names) else self.names

    def numbers(self) -> Numbers:
        """The values, [layers, epochs]; NaN where a layer has none."""
        rows = [[column.get(name) for column in self._columns] for name in self.names]
        return np.array(rows, dtype=np.float64)


def coefficients(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Coefficients of the last round of an epoch, from its line in metrics.jsonl."""
    rounds = line.get("graft")
    return _numbers(rounds.get("coefficient")) if isinstance(rounds, Mapping) else {}


def informations(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Information at the end of an epoch, from its line in metrics.jsonl."""
    return _numbers(line.get("information"))


def _numbers(values: object) -> Mapping[str, float | None]:
    """The numbers in a part of metrics.jsonl, which may have been edited."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {name: value for name, value in items if value is None or isinstance(value, int | float)}


class Pacing:
    """Limits figures to a small share of the time.

    Args:
        epochs: number of epochs of the run; the last one is always drawn.
        clock: returns the time in seconds.
    """

    def __init__(self, epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.epochs = epochs
        self._clock = clock
        self._began = clock()
        self._spent = 0.0
        self._last = _FIRST_SECONDS

    def due(self, epoch: int) -> bool:
        """Whether to draw after this epoch (0-based)."""
        if epoch == self.epochs - 1:
            return True
        apart = -(-self.epochs // MAX_DRAWINGS)
        room = MAX_SHARE * (self._clock() - self._began)
        return (epoch + 1) % apart == 0 and self._spent + self._last <= room

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count the time of the block, in which all figures of an epoch are drawn."""
        began = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - began
            self._spent += self._last
