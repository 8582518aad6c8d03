"""Requests to stop: a signal to any process of the run, or a file. Nothing here is a collective."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import SIGNALS

_LOOK_EVERY = 1.0


class StopRequests:
    """Whether this run is to stop, asked after every step.

    A signal to one process becomes known to all through the run's key-value store, which each reads
    once a second. A second signal changes nothing.

    Args:
        file: a file of this name asks, too.
        peers: of the run; None for a network alone.
        grace_seconds: after which `on_grace_expired` is called, when the process is still there.
        on_grace_expired: must end the process; called from another thread.
    """

    def __init__(
        self,
        file: Path,
        peers: PeerRegistry | None,
        *,
        grace_seconds: float,
        on_grace_expired: Callable[[], object],
    ) -> None:
        self._file = file
        self._roll_call = peers
        self._grace = threading.Timer(grace_seconds, on_grace_expired)
        self._grace.daemon = True
        self._signal: int | None = None
        self._looked = -_LOOK_EVERY
        self.reason: str | None = None
        """Why the run is to stop; None while it is not."""

    def install_handlers(self) -> None:
        """Take the signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def close(self) -> None:
        """Cancel the time limit: the run has ended."""
        self._grace.cancel()

    def requested(self) -> bool:
        """Whether the run is to stop; costs next to nothing but once a second."""
        if self.reason is None:
            self.reason = self._look()
            if self.reason is not None:
                self._grace.start()
        return self.reason is not None

    def peer_reason(self) -> str:
        """Why the run stops, for a network that its peers told so."""
        return (self._roll_call and self._roll_call.stop_reason()) or "another network"

    def _look(self) -> str | None:
        now = time.monotonic()
        if self._signal is None and now - self._looked < _LOOK_EVERY:
            return None
        self._looked = now
        if self._signal is not None:
            reason = signal.Signals(self._signal).name
        elif self._file.exists():
            reason = f"the file {self._file}"
        else:
            return self._roll_call.stop_reason() if self._roll_call else None
        if self._roll_call:
            self._roll_call.request_stop(reason)
        return reason

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number
