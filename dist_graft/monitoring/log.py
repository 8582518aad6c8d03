"""Log of a run: one file per network; rank 0 also logs to the console."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_graft.errors import RunDirectoryError, StoppedAtStartError, StoppedEarlyError, error_text
from dist_graft.printing import print_line, printable

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_logger = logging.getLogger("dist_graft")
_default_showwarning = warnings.showwarning
_pending: list[str] = []


class _Console(logging.Handler):
    """Writes around a progress bar. A closed pipe never interrupts the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(printable(self.format(record)), file=sys.stdout)
            sys.stdout.flush()


class _File(WatchedFileHandler):
    """A log file that survives a full disk, which is reported once on standard error.

    A deleted file is created again, together with its folder.
    """

    _reported = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            print_line(
                f"dist-graft: warning: {self.baseFilename} cannot be written: {error.strerror}"
            )


def hold_warnings() -> None:
    """Redirect Python's warnings to the log, so that the console does not repeat them per rank."""

    def hold(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = f"{category.__name__}: {message}"
        if _logger.handlers:
            _logger.warning("%s", text)
        else:
            _pending.append(text)

    warnings.showwarning = hold


def open_log(*folders: Path, console: bool) -> logging.Logger:
    """Start appending to log.txt in each folder and, if `console`, to standard output.

    Python's warnings are logged, too.

    Raises: RunDirectoryError when a folder cannot be written.
    """
    close_log()
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _attach(_File(folder / "log.txt", errors="backslashreplace"))
        except OSError as error:
            close_log()
            raise RunDirectoryError.not_written(folder, error) from error
    if console:
        _attach(_Console())
    hold_warnings()
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    while _pending:
        _logger.warning("%s", _pending.pop(0))
    return _logger


def _attach(handler: logging.Handler) -> None:
    if isinstance(handler, logging.FileHandler):
        handler.setFormatter(logging.Formatter(_FORMAT))
    _logger.addHandler(handler)


def close_log() -> None:
    """Detach all handlers, and restore Python's defaults for warnings and for the logger."""
    warnings.showwarning = _default_showwarning
    _logger.setLevel(logging.NOTSET)
    _logger.propagate = True
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
        handler.close()


def append_error(folder: Path, error: BaseException, *, process: str = "") -> None:
    """Append the error that ends a run to a network's log if possible.

    Args:
        folder: of the network.
        error: logged on one line.
        process: name of the process, if there are several.
    """
    line = f"{process}: {error_text(error)}" if process else error_text(error)
    stopped = isinstance(error, StoppedAtStartError | StoppedEarlyError)
    severity = "INFO" if stopped else "ERROR"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", errors="backslashreplace") as file:
            file.write(f"{severity} {line}\n")
