"""Timeout for waiting on peers; follows the length of an epoch (ADR 28)."""

from __future__ import annotations

import logging
from collections.abc import Callable

_MINIMUM_SECONDS = 60.0
_WARN_AFTER_SECONDS = 30.0
_log = logging.getLogger("dist_graft")


class Timeouts:
    """Timeout that is long until the first epoch has ended, and then proportional to an epoch.

    Args:
        seconds: until the first epoch has ended, because startup, compilation and a cold disk are
            slow. Longer for a process whose own first epoch was long.
        epochs: afterwards, multiple of the longest epoch of any network; at least one minute, or
            `seconds` if that is shorter.
    """

    def __init__(self, seconds: float, *, epochs: float) -> None:
        self._initial = seconds
        self._epochs = epochs
        self._longest_epoch = self._longest_local_epoch = 0.0

    @property
    def seconds(self) -> float:
        """Current timeout."""
        if not self._longest_epoch:
            return max(self._initial, self._epochs * self._longest_local_epoch)
        return max(min(_MINIMUM_SECONDS, self._initial), self._epochs * self._longest_epoch)

    @property
    def longest_wait(self) -> float:
        """Upper bound of all timeouts so far, including the current one."""
        return max(self._initial, self.seconds)

    def observe_epoch(self, seconds: float) -> None:
        """Record the duration of an epoch of any network, from first step to first step."""
        self._longest_epoch = max(self._longest_epoch, seconds)

    def observe_local_epoch(self, seconds: float) -> None:
        """Record the duration of this process's epoch, before the others have reported theirs."""
        self._longest_local_epoch = max(self._longest_local_epoch, seconds)

    def warn_when_slow(
        self, what: str, missing: Callable[[], list[str]]
    ) -> Callable[[float], None]:
        """Callback for a wait that logs one warning with the names of the missing peers.

        Args:
            what: the operation that waits.
            missing: returns the descriptions of the missing peers.

        Returns: function to call during the wait with the seconds waited so far.
        """
        has_warned = False

        def on_wait(seconds: float) -> None:
            nonlocal has_warned
            if has_warned or seconds < max(_WARN_AFTER_SECONDS, self._longest_epoch):
                return
            has_warned = True
            names = "; ".join(missing()) or "the other networks"
            _log.warning(
                "%s: waiting for %s for %.0f s; timeout after %.0f s",
                *(what, names, seconds, self.seconds),
            )

        return on_wait
