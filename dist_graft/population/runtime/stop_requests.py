"""Requests to stop a run: a signal to any of its processes, or a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import SIGNALS

_POLL_SECONDS = 1.0


class StopRequests:
    """Requests to stop, polled after every step. Nothing here is a collective.

    A signal to one process reaches all of them through the key-value store, which each process
    polls once a second. Further signals are ignored.

    Args:
        file: requests a stop if it exists.
        peers: registry of the run; None for a single process.
        grace_seconds: time from the request to the call of `on_grace_expired`.
        on_grace_expired: must end the process; called in another thread.
        on_poll: called at most once a second, at a poll.
    """

    def __init__(
        self,
        file: Path,
        peers: PeerRegistry | None,
        *,
        grace_seconds: float,
        on_grace_expired: Callable[[], object],
        on_poll: Callable[[], object] = lambda: None,
    ) -> None:
        self._file = file
        self._on_poll = on_poll
        self._peers = peers
        self._grace = threading.Timer(grace_seconds, on_grace_expired)
        self._grace.daemon = True
        self._signal: int | None = None
        self._last_poll = -_POLL_SECONDS
        self.reason: str | None = None
        """Reason of the stop; None if none was requested."""

    def install_handlers(self) -> None:
        """Handle the signals that request a stop."""
        for number in SIGNALS:
            signal.signal(number, self._record_signal)

    def close(self) -> None:
        """Cancel the grace period after the end of the run."""
        self._grace.cancel()

    def requested(self) -> bool:
        """Whether the run should stop; polls the file and the store at most once a second."""
        if self.reason is None:
            self.reason = self._poll()
            if self.reason is not None:
                self._grace.start()
        return self.reason is not None

    def peer_reason(self) -> str:
        """Reason of a stop that a peer announced in a collective."""
        return (self._peers and self._peers.stop_reason()) or "another network"

    def _poll(self) -> str | None:
        now = time.monotonic()
        if self._signal is None and now - self._last_poll < _POLL_SECONDS:
            return None
        self._last_poll = now
        self._on_poll()
        if self._signal is not None:
            reason = signal.Signals(self._signal).name
        elif self._file.exists():
            reason = f"the file {self._file}"
        else:
            return self._peers.stop_reason() if self._peers else None
        if self._peers:
            self._peers.request_stop(reason)
        return reason

    def _record_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number
