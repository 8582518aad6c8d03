"""A file of JSON lines that grows with a run, and outlives a disk that is full for a while."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_graft.errors import RunDirectoryError


class JsonLinesFile:
    """Appends objects, one a line; what is no longer wanted of an earlier start is dropped first.

    A file that vanishes begins again, in a folder that is made anew where it has to be.

    Args:
        path: of the file; its folder exists.
        keep: whether an object that is there already stays; those that cannot be read do not.

    Raises: RunDirectoryError when the disk refuses.
    """

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
        self._path = path
        self._pending: list[str] = []
        self.kept: list[dict[str, Any]] = []
        """What stayed, in order."""
        try:
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            self.kept = [read for line in lines if (read := _read(line)) and _wanted(read, keep)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(_line(read) for read in self.kept))
            temporary.replace(path)
        except OSError as error:
            raise _refused(path, error) from error

    @property
    def vanished(self) -> bool:
        """Whether the file is no longer there."""
        return not self._path.exists()

    def write(self, content: Mapping[str, Any]) -> None:
        """Append one object; numbers that JSON does not know (NaN, infinity) become null.

        Raises: RunDirectoryError when the disk refuses; the next call writes this object, too.
        """
        self._pending.append(_line(content))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                text = "".join(self._pending).encode()
                try:
                    written = file.write(text)
                    if written != len(text):
                        file.write(text[written:])
                except OSError:
                    file.truncate(size)  # no half lines
                    raise
        except OSError as error:
            raise _refused(self._path, error) from error
        self._pending.clear()


def _refused(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} cannot be written: {error.strerror}; free space or choose another run_dir"
    )


def _read(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None  # a line that was cut off
    return content if isinstance(content, dict) else None


def _wanted(content: dict[str, Any], keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(content)
    except (KeyError, TypeError):
        return False


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(_jsonable(content)) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
