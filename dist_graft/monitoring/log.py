"""The run's log: every network into its own file, the first also onto the console."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_graft.errors import RunDirectoryError
from dist_graft.printing import print_line

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_logger = logging.getLogger("dist_graft")
_shown_by_python = warnings.showwarning
_held: list[str] = []


class _Console(logging.Handler):
    """Writes around a progress bar; where nobody reads any more, the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _File(WatchedFileHandler):
    """A log file whose disk may be full: said once on standard error, and the run goes on.

    A file that vanishes begins again, with its folder.
    """

    _told = False

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
        elif not self._told:
            self._told = True
            print_line(
                f"dist-graft: warning: {self.baseFilename} cannot be written: {error.strerror}"
            )


def hold_warnings() -> None:
    """Keep Python's warnings for the log, so that the console has them once, not once a rank."""

    def hold(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = f"{category.__name__}: {message}"
        if _logger.handlers:
            _logger.warning("%s", text)
        else:
            _held.append(text)

    warnings.showwarning = hold


def open_log(*folders: Path, console: bool) -> logging.Logger:
    """Start appending to log.txt in each folder, and to standard output when `console`.

    Python's warnings go there, too.

    Raises: RunDirectoryError when a folder cannot be written.
    """
    close_log()
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _attach(_File(folder / "log.txt"))
        except OSError as error:
            close_log()
            raise RunDirectoryError(
                f"{folder} cannot be written: {error.strerror}; choose another run_dir"
            ) from error
    if console:
        _attach(_Console())
    hold_warnings()
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    while _held:
        _logger.warning("%s", _held.pop(0))
    return _logger


def _attach(handler: logging.Handler) -> None:
    if isinstance(handler, logging.FileHandler):
        handler.setFormatter(logging.Formatter(_FORMAT))
    _logger.addHandler(handler)


def close_log() -> None:
    """Detach all handlers, and leave warnings to Python again."""
    warnings.showwarning = _shown_by_python
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
        handler.close()


def append_line(folder: Path, line: str) -> None:
    """Add an error's line to a network's log when it can be; the console has it in any case."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as file:
            file.write(line + "\n")
    except OSError:
        return
