"""Append-only JSON Lines files that survive a full disk and a deleted folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.callback import Callback
from dist_graft.run_directory import write_atomically

if TYPE_CHECKING:
    from dist_graft.monitoring.metrics import EpochReport
    from dist_graft.training.trainer import Trainer


class JsonLinesFile:
    """Appends objects, one per line, after dropping lines that a resumed run will write again.

    A deleted file is created again, together with its folder.

    Args:
        path: of the file; its folder exists.
        keep: whether an existing object stays. Unreadable lines are dropped.

    Raises: RunDirectoryError on a disk error.
    """

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
        self._path = path
        self._pending: list[str] = []
        try:
            self.kept = [item for item in read_json_lines(path) if _wanted(item, keep)]
            """Objects that stayed, in order."""
        except OSError as error:
            raise RunDirectoryError.not_written(path, error) from error
        content = "".join(_line(item) for item in self.kept)
        write_atomically(path, content.encode(), durable=False)

    @property
    def vanished(self) -> bool:
        """Whether the file no longer exists."""
        return not self._path.exists()

    def write(self, content: Mapping[str, Any]) -> None:
        """Append one object. NaN and Inf become null.

        Raises: RunDirectoryError on a disk error; the next call writes this object, too.
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
                    with contextlib.suppress(OSError):  # the first error is the cause
                        file.truncate(size)  # no partial lines
                    raise
        except OSError as error:
            raise RunDirectoryError.not_written(self._path, error) from error
        self._pending.clear()


class MetricsJsonl(Callback):
    """Writes metrics.jsonl of one network, one line per epoch."""

    def on_fit_start(self, trainer: Trainer) -> None:
        start = trainer.epoch
        path = trainer.directory.metrics(trainer.process.network)
        self._file = JsonLinesFile(path, keep=lambda line: line["epoch"] < start)

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        vanished = self._file.vanished
        self._file.write(report.metrics.to_json())
        if vanished:
            trainer.log.warning(
                "%s was deleted: it is recreated without its previous contents, and training "
                "continues",
                trainer.directory.path,
            )
            if trainer.process.is_main:
                trainer.directory.write_config(
                    trainer.config, trainer.process.networks, trainer.custom
                )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file, in order; lines that are not objects are skipped."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return [item for line in text.splitlines() if (item := parse_line(line))]


def parse_line(line: str) -> dict[str, Any] | None:
    """The object in a line of a JSON Lines file; None for anything else."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None  # a damaged line
    return content if isinstance(content, dict) else None


def _wanted(content: dict[str, Any], keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(content)
    except (KeyError, TypeError):
        return False


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(finite_or_none(content)) + "\n"


def finite_or_none(value: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None; also inside mappings and lists."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite_or_none(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
