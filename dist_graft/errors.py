"""Errors that end a run. The message is the one line that the user reads."""

from __future__ import annotations


class DistGraftError(Exception):
    """Base class of errors shown without traceback. The message names the cause and what to do."""

    exit_status = 1


class ConfigError(DistGraftError, ValueError):
    """An option is unknown, out of range, or incompatible with another."""

    exit_status = 2


class DataError(DistGraftError):
    """A data set is missing, empty or unreadable."""


class RunDirectoryError(DistGraftError):
    """The run directory cannot be written, or holds another run."""


class DisagreementError(DistGraftError):
    """The networks of a population differ in tensors, graft units or options."""


class NonFiniteError(DistGraftError):
    """A weight is NaN or infinite."""


class PeerError(DistGraftError):
    """Another process of the population exited, or did not respond in time."""


class StoppedError(DistGraftError):
    """A signal stopped the process."""

    exit_status = 143


class StoppedEarlyError(StoppedError):
    """The run stopped on request after a checkpoint and can be resumed."""

    exit_status = 75


class RoundStoppedError(DistGraftError):
    """A network requested a stop instead of joining a round. No weight was changed."""


class RoundPostponedError(DistGraftError):
    """A checkpoint set comes before the round, at which some networks have yet to take part.

    Args:
        saves: requested sets at which each network must have taken part.
    """

    def __init__(self, saves: int) -> None:
        super().__init__(f"checkpoint set {saves} comes first")
        self.saves = saves


class StartError(DistGraftError):
    """The processes cannot connect, or a device or backend is unavailable."""
