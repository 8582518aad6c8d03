"""Checks that all processes see the file that rank 0 writes to the run directory."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from dist_graft.errors import RunDirectoryError

MAX_LAG_SECONDS = 15.0
"""Maximum time until a shared disk shows a new file on another machine."""
_POLL_SECONDS = 0.2


def write_token(folder: Path) -> str:
    """Write a random token to the folder, and return it.

    Raises: RunDirectoryError when the folder cannot be written.
    """
    token = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _path(folder, token).write_text(token)
    except OSError as error:
        raise RunDirectoryError.not_written(folder, error) from error
    return token


def sees_token(folder: Path, token: str, seconds: float) -> bool:
    """Whether this process can read the token within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not visible yet
            if _path(folder, token).read_text() == token:
                return True
        time.sleep(_POLL_SECONDS)
    return False


def remove_token(folder: Path, token: str) -> None:
    """Remove the token."""
    _path(folder, token).unlink(missing_ok=True)


def refuse_unshared(
    folder: Path, seen: Sequence[Sequence[float]], hosts: Sequence[str], replicas: int, lag: float
) -> None:
    """Raise RunDirectoryError if some processes did not see the token within `lag` seconds.

    Args:
        folder: the run directory.
        seen: for each rank, whether it sees the token.
        hosts: host of each rank.
        replicas: processes per network.
        lag: time limit in seconds.
    """
    blind = [
        f"network {rank // replicas} on {host}"
        for rank, (host, (sees,)) in enumerate(zip(hosts, seen, strict=True))
        if not sees
    ]
    if blind:
        raise RunDirectoryError(
            f"{folder} is not shared by all processes: {'; '.join(dict.fromkeys(blind))} did not "
            f"see within {lag:g} s what network 0 wrote there; choose a run_dir on a disk that all "
            "machines mount under the same path"
        )


def _path(folder: Path, token: str) -> Path:
    return folder / f".shared-{token}"
