"""Where a process's time goes between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

from dist_graft.monitoring.layout import PHASES


def named(phase: str) -> AbstractContextManager[object]:
    """Name a block in a profile; costs next to nothing while none is taken."""
    return record_function(phase) if torch.autograd._profiler_enabled() else nullcontext()


class TimeSheet:
    """Adds up seconds by phase; what no phase accounts for is "other"."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds = _nothing()

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[phase] += seconds

    @contextmanager
    def spend(self, phase: str) -> Iterator[None]:
        """Add the time of the block, and name it in a profile."""
        began = time.perf_counter()
        with named(phase):
            yield
        self._seconds[phase] += time.perf_counter() - began

    def hand_in(self) -> dict[str, float]:
        """Seconds by phase since the last call, or since the beginning; starts anew."""
        handed, began = self._seconds, self._began
        self._seconds, self._began = _nothing(), time.perf_counter()
        handed["other"] = max(0.0, self._began - began - sum(handed.values()))
        return handed


def _nothing() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)
