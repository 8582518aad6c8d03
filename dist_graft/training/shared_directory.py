"""Files with which rank 0 checks that all processes see the same run directory."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from dist_graft.errors import RunDirectoryError

MAX_LAG_SECONDS = 15.0
"""How long a shared disk may take to show a new file on another machine."""
_POLL_SECONDS = 0.2


def write_token(folder: Path, token: str) -> None:
    """Leave a token in the folder.

    Raises: RunDirectoryError when the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _path(folder, token).write_text(token)
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written: {error.strerror}; choose another run_dir"
        ) from error


def sees_token(folder: Path, token: str, seconds: float) -> bool:
    """Whether the token is visible here within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not there yet, or never
            if _path(folder, token).read_text() == token:
                return True
        time.sleep(_POLL_SECONDS)
    return False


def remove_token(folder: Path, token: str) -> None:
    """Remove the token."""
    _path(folder, token).unlink(missing_ok=True)


def _path(folder: Path, token: str) -> Path:
    return folder / f".shared-{token}"
