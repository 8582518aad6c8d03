"""What the files of a run say; what is missing or torn is left out, and named. No torch here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_graft.errors import RunDirectoryError
from dist_graft.training.checkpoint.files import complete_sets
from dist_graft.training.run_directory import RunDirectory

_TAIL_BYTES = 1 << 18  # of a file that grows; hundreds of epochs, or a few of a huge network

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class NetworkFiles:
    """What one network's folder holds."""

    network: int
    standing: Fields | None
    """status.json."""
    last: Fields | None
    """The last line of metrics.jsonl."""
    last_round: Fields | None
    """Of the last epoch with a round: `graft` of metrics.jsonl."""
    error: str | None
    """The line that ended log.txt, if it tells of an error."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run directory holds."""

    path: Path
    config: Fields
    """Nested as in config.yaml; empty when that cannot be read."""
    networks: list[NetworkFiles]
    events: list[Fields]
    """Of population/events.jsonl, in order."""
    summary: Fields | None
    stopped: str | None
    """What STOPPED_EARLY says."""
    newest_set: str | None
    epochs_saved: int
    """Epochs that the newest complete checkpoint set has finished."""
    problems: list[str] = field(default_factory=list)
    """Files that are there and cannot be read, or not whole."""

    @property
    def epochs(self) -> int:
        """Of the run; 0 when unknown."""
        epochs = self.config.get("epochs")
        return epochs if isinstance(epochs, int) else 0


def read_run(path: Path) -> RunFiles:
    """Read what is there.

    Raises: RunDirectoryError when this is no run directory.
    """
    directory = RunDirectory(str(path))
    folders = _network_folders(path)
    if not folders and not directory.config.is_file():
        raise RunDirectoryError(
            f"{path} is no run directory: it has neither config.yaml nor network00"
        )
    problems: list[str] = []
    config = _read_config(directory.config, problems)
    told = config.get("run", {}).get("networks")
    count = told if isinstance(told, int) else 0
    networks = sorted({*folders, *range(count)})
    sets = complete_sets(directory.checkpoints)
    return RunFiles(
        path=path,
        config=config,
        networks=[_read_network(directory, network, problems) for network in networks],
        events=_read_lines(directory.events, problems),
        summary=_read_object(directory.summary, problems),
        stopped=_read_text(directory.stopped, problems),
        newest_set=sets[-1].path.name if sets else None,
        epochs_saved=sets[-1].epoch if sets else 0,
        problems=problems,
    )


def _network_folders(path: Path) -> list[int]:
    names = (re.fullmatch(r"network(\d{2,})", folder.name) for folder in path.glob("network*"))
    return [int(name[1]) for name in names if name]


def _read_network(directory: RunDirectory, network: int, problems: list[str]) -> NetworkFiles:
    folder = directory.network(network)
    lines = [line for line in _read_lines(folder / "metrics.jsonl", problems) if _is_epoch(line)]
    rounds = [line["graft"] for line in lines if isinstance(line.get("graft"), dict)]
    log = (_read_text(folder / "log.txt", problems, tail=True) or "").splitlines()
    ended = next((line for line in reversed(log) if line.strip()), "")
    return NetworkFiles(
        network=network,
        standing=_read_object(directory.status(network), problems),
        last=lines[-1] if lines else None,
        last_round=rounds[-1] if rounds else None,
        error=ended.removeprefix("ERROR ") if ended.startswith("ERROR ") else None,
    )


def _is_epoch(line: Fields) -> bool:
    return isinstance(line.get("epoch"), int)


def _read_config(path: Path, problems: list[str]) -> Fields:
    text = _read_text(path, problems)
    if text is None:
        return {}
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("run", {}), dict):
        problems.append(f"{path} cannot be read")
        return {}
    return config


def _read_object(path: Path, problems: list[str]) -> Fields | None:
    text = _read_text(path, problems)
    if text is None:
        return None
    content = _parsed(text)
    if content is None:
        problems.append(f"{path} cannot be read")
    return content


def _read_lines(path: Path, problems: list[str]) -> list[Fields]:
    """The objects at a file's end; a line without an end is being written, or was cut off."""
    text = _read_text(path, problems, tail=True) or ""
    lines = [_parsed(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    torn = lines.count(None)
    if torn:
        problems.append(f"{path}: {torn} of the last {len(lines)} lines cannot be read")
    return [line for line in lines if line is not None]


def _parsed(text: str) -> Fields | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_text(path: Path, problems: list[str], *, tail: bool = False) -> str | None:
    """A file, or its end from the start of a line; None when there is no file."""
    try:
        with path.open("rb") as file:
            cut = max(0, file.seek(0, 2) - _TAIL_BYTES) if tail else 0
            file.seek(cut)
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return None
    if cut:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")
