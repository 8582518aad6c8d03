"""Errors that end a run. The message is the one line that the user reads."""

from __future__ import annotations

import errno
import re
import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SEE_PEER = "see its output for the cause"
"""Part of the messages of processes that end because another one has failed."""
_HAS_DIVERGED = re.compile(r"network \d+ has a [a-z, ]+ that is not finite")
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DistGraftError(Exception):
    """Base class of errors shown without traceback. The message names the cause and what to do."""

    exit_status = 1
    is_common = False
    """Whether all processes fail with this message, which then need not name one of them."""


def error_text(error: BaseException) -> str:
    """The error on one line. Errors that are not for the user start with "unexpected"."""
    ours = isinstance(error, DistGraftError)
    return " ".join((f"{error}" if ours else f"unexpected {type(error).__name__}: {error}").split())


class ConfigError(DistGraftError, ValueError):
    """An option is unknown, out of range, or incompatible with another."""

    exit_status = 2


class DataError(DistGraftError):
    """A dataset is missing, empty or unreadable."""


class RunDirectoryError(DistGraftError):
    """The run directory cannot be written, or holds another run."""

    @classmethod
    def not_written(cls, what: object, error: OSError) -> RunDirectoryError:
        """Error for something in a run directory that cannot be written."""
        advice = "free space or " if error.errno in _DISK_IS_FULL else ""
        return cls(f"{what} cannot be written: {error.strerror}; {advice}choose another run_dir")


class LeaseHeldError(RunDirectoryError):
    """Another process uses the folder. Nothing was written there."""


class LeaseLostError(LeaseHeldError):
    """Another process has taken over the folder, because this one was stopped for too long."""


class DisagreementError(DistGraftError):
    """The networks of a population differ in tensors, graft units or options."""


class NonFiniteError(DistGraftError):
    """A weight, training loss or gradient is NaN or infinite."""

    @classmethod
    def of_networks(cls, diverged: Mapping[int, str], round_: int | None = None) -> NonFiniteError:
        """The error of a run whose networks have diverged.

        Args:
            diverged: by network, what is not finite in it, such as "a weight that is not finite".
            round_: round that found it; None outside of rounds.
        """
        who = "; ".join(f"network {network} has {what}" for network, what in diverged.items())
        where = "" if round_ is None else f" (round {round_})"
        return cls(f"{who}{where}: try a lower learning rate, warm-up or gradient clipping")

    @staticmethod
    def is_reported_in(line: str) -> bool:
        """Whether a line of a run's output reports networks that have diverged."""
        return bool(_HAS_DIVERGED.search(line))


class PeerError(DistGraftError):
    """Another process of the population exited, or did not respond in time."""


class NetworkFailedError(DistGraftError):
    """A process that `dist_graft.launch` started has failed.

    The message is one line. It names the network and the rank that failed first, unless all fail
    alike, as with a wrong option of a Trainer. Unless the error was a DistGraftError, the traceback
    of that process is attached as a note, so that Python prints it with this exception.

    Args:
        message: shown to the user.
        network: network of the process.
        rank: rank of the process.
        exit_status: exit status of the process.
        traceback: formatted traceback; empty for one-line errors and killed processes.
    """

    def __init__(
        self, message: str, *, network: int, rank: int, exit_status: int = 1, traceback: str = ""
    ) -> None:
        super().__init__(message)
        self.network = network
        self.rank = rank
        self.exit_status = exit_status
        self.traceback = traceback
        if traceback:
            self.add_note(f"Traceback of network {network} (rank {rank}):\n{traceback.rstrip()}")


class StoppedError(DistGraftError):
    """A signal stopped the process."""

    exit_status = 143


class StoppedEarlyError(StoppedError):
    """The run stopped on request after a checkpoint and can be resumed."""

    exit_status = 75


class StoppedAtStartError(StoppedError):
    """A signal stopped the process before training began."""

    @classmethod
    def by(cls, number: signal.Signals) -> StoppedAtStartError:
        """The error for a signal."""
        error = cls(f"stopped by {number.name} before training began; rerun the command to train")
        error.exit_status = 128 + number
        return error


class RoundStoppedError(DistGraftError):
    """A network requested a stop instead of joining a round. No weight was changed."""


class StartError(DistGraftError):
    """The processes cannot connect, or a device or backend is unavailable."""


class UserCodeError(DistGraftError):
    """User code raised an exception, which is the cause of this error."""

    def user_traceback(self) -> str:
        """Traceback of the user's exception, without the frames of this package.

        Empty if it was raised in another process, or here because of what the user's code returned.
        """
        if self.__cause__ is None:
            return ""
        found = traceback.TracebackException.from_exception(self.__cause__)
        package = Path(__file__).parent
        frames = [frame for frame in found.stack if package not in Path(frame.filename).parents]
        found.stack = traceback.StackSummary.from_list(frames)
        return "".join(found.format()).rstrip() if frames else ""


class FunctionError(UserCodeError):
    """A user-defined function raised an exception."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Convert an exception of user code into a FunctionError that names the function.

    Except for a lack of GPU memory, which is not the function's fault.
    """
    try:
        yield
    except DistGraftError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise FunctionError(f"{what} failed: {type(error).__name__}: {error}") from error


class CallbackError(UserCodeError):
    """A user-defined callback raised an exception."""


class SampleError(DataError, UserCodeError):
    """A user-defined dataset raised an exception."""


@dataclass
class CaughtError:
    """Result of `caught`."""

    error: DistGraftError | None = None


@contextmanager
def caught(*others: type[DistGraftError]) -> Iterator[CaughtError]:
    """Catch a DistGraftError, so that all ranks can raise it together.

    Except a stop by a signal, after which a process must not wait for the others.

    Args: others: further errors that are not caught.
    """
    found = CaughtError()
    try:
        yield found
    except DistGraftError as error:
        if isinstance(error, (StoppedError, *others)):
            raise
        found.error = error


@contextmanager
def mark_common() -> Iterator[None]:
    """Mark a ConfigError or DataError as common: the options and data are the same everywhere.

    Errors of user code are not marked: it may fail in one process only.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        error.is_common = not isinstance(error, UserCodeError)
        raise


def to_text(error: DistGraftError) -> str:
    """Convert an error to text, for `from_text` in another process."""
    return f"{type(error).__name__} {error}"


def from_text(text: str) -> DistGraftError:
    """Convert text from `to_text` to an error; a DistGraftError if its class is the user's."""
    name, _, message = text.partition(" ")
    kind: type[DistGraftError] = globals().get(name, DistGraftError)
    return kind(message)
