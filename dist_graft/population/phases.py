"""Where a round's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up where a round's time goes; on a GPU a phase ends when its kernels have.

    A transfer that nobody waits for yet has a stream of its own, and goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        phases = ("measure", "agree", "pack", "exchange", "distance", "blend")
        self.seconds = dict.fromkeys(phases, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        yield
        if self._device.type != "cpu":
            torch.accelerator.current_stream(self._device).synchronize()
        self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start
