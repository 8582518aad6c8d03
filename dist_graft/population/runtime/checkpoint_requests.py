"""Requests for a checkpoint set between epochs. Nothing here is a collective."""

from __future__ import annotations

import time

from dist_graft.population.runtime.peers import PeerRegistry

_LOOK_EVERY = 1.0


class SaveRequests:
    """Every few minutes one process asks all networks for a checkpoint set.

    Each network saves after the step at which it hears of it. A set is consistent when all networks
    finished as many rounds: none enters a round or ends an epoch before all have `count` in common.

    Args:
        minutes: between two sets; None: never.
        peers: of the run; None for a network alone.
        asks: whether this process is the one that asks.
    """

    def __init__(self, minutes: float | None, peers: PeerRegistry | None, *, asks: bool) -> None:
        self._every = None if minutes is None else 60.0 * minutes
        self._roll_call = peers
        self._asks = asks
        self._last = self._looked = time.monotonic()
        self.count = 0
        """Requested sets at which this network took part."""

    def due(self, *, busy: bool) -> bool:
        """Whether the network is to save now; costs next to nothing but once a second.

        Args:
            busy: whether the set before is still being written.
        """
        now = time.monotonic()
        if self._every is None or busy or now - self._looked < min(_LOOK_EVERY, self._every):
            return False
        self._looked = now
        if self._asks:
            return now - self._last >= self._every
        return bool(self._roll_call and self._roll_call.is_published(self._next, 0))

    def agreed(self, name: str, timeout_seconds: float) -> str:
        """The name of the set that is due: what the asking process calls it."""
        if self._roll_call is None:
            return name
        if self._asks:
            self._roll_call.publish(self._next, name)
            return name
        return self._roll_call.read(self._next, 0, timeout_seconds)

    def done(self) -> None:
        """The network took part in a requested set."""
        self.count += 1
        self.saved()

    def saved(self) -> None:
        """There is a set; the next request counts from here."""
        self._last = time.monotonic()

    @property
    def _next(self) -> str:
        return f"save {self.count + 1}"
