"""Networks of different speeds, simulated."""

from __future__ import annotations

import time

from dist_graft import Callback, Trainer


class HalfSlow(Callback):
    """Halves the speed of the second half of the networks: they sleep as long as a step takes."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Start the clock of the first step."""
        self._start = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        """Sleep after a step."""
        if 2 * trainer.process.network >= trainer.process.networks:
            time.sleep(time.perf_counter() - self._start)
        self._start = time.perf_counter()
