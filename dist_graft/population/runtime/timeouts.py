"""How long a process waits for its peers before it gives up on them."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LEAST_SECONDS = 60.0
_REMARK_SECONDS = 30.0
_log = logging.getLogger("dist_graft")


class Timeouts:
    """A time-out that is long at first, and then follows the length of an epoch.

    Args:
        seconds: until the first epoch is over: starting, compiling and a cold disk take long.
            Longer for a process whose own epoch is over, if that was long.
        epochs: afterwards, so many times the longest epoch that any network has taken; at least
            a minute, or `seconds` where that is less.
    """

    def __init__(self, seconds: float, *, epochs: float) -> None:
        self._at_first = seconds
        self._epochs = epochs
        self._longest = self._own = 0.0

    @property
    def seconds(self) -> float:
        """How long to wait now."""
        if not self._longest:
            return max(self._at_first, self._epochs * self._own)
        return max(min(_LEAST_SECONDS, self._at_first), self._epochs * self._longest)

    @property
    def longest_wait(self) -> float:
        """No collective between networks so far, or from now on, is waited for longer."""
        return max(self._at_first, self.seconds)

    def observe_epoch(self, epoch_seconds: float) -> None:
        """An epoch of some network took so long, from its first step to the next one's."""
        self._longest = max(self._longest, epoch_seconds)

    def observe_local_epoch(self, epoch_seconds: float) -> None:
        """This process's epoch took so long; nothing is known of the others' yet."""
        self._own = max(self._own, epoch_seconds)

    def warn_when_slow(self, what: str, absent: Callable[[], list[str]]) -> Callable[[float], None]:
        """What to call while waiting, with the seconds waited: says once who is waited for."""
        said = False

        def waited(seconds: float) -> None:
            nonlocal said
            if said or seconds < max(_REMARK_SECONDS, self._longest):
                return
            said = True
            who = "; ".join(absent()) or "the other networks"
            _log.warning(
                "%s: waiting for %s since %.0f s; gives up after %.0f s",
                *(what, who, seconds, self.seconds),
            )

        return waited
