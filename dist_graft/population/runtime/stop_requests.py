"""Requests to stop a run: a signal to any of its processes, or a file."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import FrameType

from dist_graft.errors import PeerError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import SIGNALS, handle_signals

_POLL_SECONDS = 1.0


class GracePeriod:
    """Ends the process some time after the first request to stop, unless it is cancelled.

    Args:
        seconds: from the request to the call of `on_expired`.
        on_expired: must end the process; called in another thread.
    """

    def __init__(self, seconds: float, on_expired: Callable[[], object]) -> None:
        self._seconds = seconds
        self._timer = threading.Timer(seconds, on_expired)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._end = math.inf

    def start(self) -> None:
        """Start the period; without effect if it has started. Not for signal handlers."""
        with self._lock:
            if self._end == math.inf:
                self._end = time.monotonic() + self._seconds
                self._timer.start()

    @property
    def seconds_left(self) -> float:
        """Seconds until the process ends; infinite before the first request."""
        return self._end - time.monotonic()

    def cancel(self) -> None:
        """Cancel the grace period; it cannot be restarted."""
        self._timer.cancel()


class SignalMonitor:
    """Calls a function, in a thread, for each signal that asks a run to stop.

    This works while the main thread is blocked outside of Python, where no handler of Python is
    called: the interpreter itself writes the number of each handled signal into a pipe
    (`signal.set_wakeup_fd`). Create it in the main thread.
    """

    def __init__(self, on_signal: Callable[[signal.Signals], object]) -> None:
        self._on_signal = on_signal
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def close(self) -> None:
        """End the thread, and restore the former receiver of signals."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)

    def _watch(self) -> None:
        while number := os.read(self._reading, 1):
            if number[0] in SIGNALS:
                self._on_signal(signal.Signals(number[0]))
        os.close(self._reading)


# A signal to a forked process, such as a loader worker, is not one to this process.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopRequests:
    """Requests to stop, polled after every step. Nothing here is a collective.

    A signal to one process reaches all of them through the key-value store, which each process
    polls once a second. Further signals are ignored.

    Args:
        files: each requests a stop if it exists.
        peers: registry of the run; None for a single process.
        grace: started by the first request.
        on_poll: called at most once a second, at a poll.
        ignored: those of the files that request nothing, if they exist now, until touched again.
    """

    def __init__(
        self,
        files: Collection[Path],
        peers: PeerRegistry | None,
        *,
        grace: GracePeriod,
        on_poll: Callable[[], object] = lambda: None,
        ignored: Collection[Path] = (),
    ) -> None:
        self._files = {path: _touched(path) if path in ignored else None for path in files}
        self._on_poll = on_poll
        self._peers = peers
        self._grace = grace
        self._handles_signals = False
        self._signal: int | None = None
        self._last_poll = -_POLL_SECONDS
        self.reason: str | None = None
        """Reason of the stop; None if none was requested."""

    def install_handlers(self) -> None:
        """Handle the signals that request a stop."""
        handle_signals(self._record_signal)
        self._handles_signals = True

    def announce(self, number: signal.Signals) -> None:
        """Pass a signal on to the peers, while the main thread may be waiting for them."""
        if self._handles_signals and self._peers:
            with suppress(PeerError):  # the grace period ends this process
                self._peers.request_stop(number.name)

    def requested(self) -> bool:
        """Whether the run should stop; polls the file and the store at most once a second."""
        if self.reason is None:
            self.reason = self._poll()
            if self.reason is not None:
                self._grace.start()
        return self.reason is not None

    @property
    def seconds_left(self) -> float:
        """Seconds left of the grace period; infinite if no stop was requested."""
        return self._grace.seconds_left

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
        elif file := self._new_file():
            reason = f"the file {file}"
        else:
            return self._peers.stop_reason() if self._peers else None
        if self._peers:
            self._peers.request_stop(reason)
        return reason

    def _new_file(self) -> Path | None:
        """The first file that exists and requests a stop."""
        return next((p for p, old in self._files.items() if _touched(p) not in (None, old)), None)

    def _record_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number


def _touched(path: Path) -> tuple[int, int] | None:
    """Identity and time of a file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
