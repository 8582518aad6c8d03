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
        device: device of the timed work. On an accelerator, a phase is measured by events on the
            current stream, so timing never waits for the device; transfers on other streams may
            still be in flight when a phase ends. None: host time only.
    """

    def __init__(self, phases: Sequence[str], device: torch.device | None = None) -> None:
        self._phases = tuple(phases)
        self._accelerator = device if device is not None and device.type != "cpu" else None
        self._recorded: list[tuple[str, torch.Event, torch.Event]] = []
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(self._phases, 0.0)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase; on an accelerator, reading them waits for the recorded phases."""
        for name, start, end in self._recorded:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._recorded.clear()
        return self._seconds

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[phase] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase, and label it in profiler traces.

        A block that raises is not counted.
        """
        with profiler_label(name):
            if self._accelerator is None:
                start = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - start
            else:
                begin = self._event()
                yield
                self._recorded.append((name, begin, self._event()))

    def _event(self) -> torch.Event:
        """Record an event on the current stream."""
        event = torch.Event(self._accelerator, enable_timing=True)
        event.record()
        return event

    def total(self) -> float:
        """Seconds since the timer was created or reset."""
        return time.perf_counter() - self._start

    def reset(self) -> dict[str, float]:
        """Return the seconds by phase plus the remainder as "other", and start again from zero."""
        elapsed, seconds = self.total(), self.seconds
        self._start += elapsed
        self._seconds = dict.fromkeys(self._phases, 0.0)
        return seconds | {"other": max(0.0, elapsed - sum(seconds.values()))}
