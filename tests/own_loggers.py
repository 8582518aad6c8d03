"""Loggers as a user writes them: one that writes files, and two that fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_graft.monitoring.logger import LoggedRun


class FileLogger:
    """Appends every call to RUN/own/ID.jsonl."""

    def __init__(self, run: LoggedRun) -> None:
        self.path = run.folder / "own" / f"{run.id}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        values = {"group": run.group, "tags": dict(run.tags), "config": dict(run.config)}
        self._append("open", values)

    def _append(self, call: str, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([call, value]) + "\n")

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        self._append("log", {"epoch": epoch, **scalars})

    def finish(self, status: str) -> None:
        self._append("finish", status)


class FailingLogger(FileLogger):
    """Has no space from the second epoch on."""

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        if epoch == 1:
            raise OSError(28, "No space left\non device")
        super().log(scalars, epoch)


class HangingLogger(FileLogger):
    """Waits for a service that does not answer."""

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        threading.Event().wait()


class NotCreated:
    """Cannot be created."""

    def __init__(self, run: LoggedRun) -> None:
        raise ConnectionError(f"no route to host for {run.group}")


def calls(run: Path, name: str) -> list[tuple[str, Any]]:
    """All calls of the FileLogger whose id ends with a name, in order."""
    (path,) = (run / "own").glob(f"*-{name}.jsonl")
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]
