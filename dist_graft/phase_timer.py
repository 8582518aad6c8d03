"""Timer that adds up the time spent in each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function


def profiler_label(phase: str) -> AbstractContextManager[object]:
    """Label a block in a profiler trace; costs almost nothing when no profiler runs."""
    return record_function(phase) if torch.autograd._profiler_enabled() else nullcontext()


class PhaseTimer:
    """Adds up seconds by phase.

    Args:
        phases: names of the phases.
        device: device of the timed work. On an accelerator, a phase ends once the current stream
            is idle; transfers on other streams may still be in flight. None: host time only.
    """

    def __init__(self, phases: Sequence[str], device: torch.device | None = None) -> None:
        self._phases = tuple(phases)
        self._device = device
        self._start = time.perf_counter()
        self.seconds = dict.fromkeys(self._phases, 0.0)

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self.seconds[phase] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase, and label it in profiler traces.

        A block that raises is not counted.
        """
        start = time.perf_counter()
        with profiler_label(name):
            yield
            if self._device is not None and self._device.type != "cpu":
                torch.accelerator.current_stream(self._device).synchronize()
        self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the timer was created or reset."""
        return time.perf_counter() - self._start

    def reset(self) -> dict[str, float]:
        """Return the seconds by phase plus the remainder as "other", and start again from zero."""
        elapsed, seconds = self.total(), self.seconds
        self._start += elapsed
        self.seconds = dict.fromkeys(self._phases, 0.0)
        return seconds | {"other": max(0.0, elapsed - sum(seconds.values()))}
