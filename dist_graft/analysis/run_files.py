"""Reads the files of a run directory without importing torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.jsonl import parse_line
from dist_graft.population.runtime.lease import LeaseInfo, read_lease
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import (
    Checkpoint,
    complete_checkpoints,
    job_checkpoints,
)

_MAX_NETWORKS = 10_000  # a larger number means a damaged file
_OF_NETWORK = ("log.txt", "status.json", "metrics.jsonl")
_TAIL_BYTES = 1 << 18  # read of a growing file: hundreds of epochs, or a few of a huge network

Fields = dict[str, Any]
"""A JSON object. Empty if its file is missing or unreadable."""


@dataclass(frozen=True, kw_only=True)
class NetworkFiles:
    """Files of one network."""

    network: int
    status: Fields
    """status.json."""
    last_epoch: Fields
    """Last line of metrics.jsonl."""
    last_round: Fields
    """`graft` of the last epoch that had a round."""
    error: str | None
    """Last line of log.txt, if it is an error."""
    checkpoint: str | None = None
    """Name of its latest complete checkpoint, if the network is an independent job."""
    lease: LeaseInfo | None = None
    """Holder of the network, if it is an independent job."""

    @property
    def phase(self) -> str | None:
        """What the process was doing when it last wrote status.json."""
        phase = self.status.get("phase")
        return phase if isinstance(phase, str) else None


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Files of a run."""

    path: Path
    config: Fields
    """config.yaml, nested."""
    networks: list[NetworkFiles]
    events: list[Fields]
    """Lines of population/events.jsonl, in order."""
    summary: Fields
    """summary.json."""
    stopped: str | None
    """Content of STOPPED_EARLY."""
    checkpoint: str | None
    """Name of the latest complete checkpoint."""
    checkpoint_epoch: int
    """Epochs finished at the latest complete checkpoint."""
    problems: list[str] = field(default_factory=list)
    """Files that exist but cannot be read completely."""

    @property
    def of_jobs(self) -> bool:
        """Whether each network is an independent job."""
        return _is_of_jobs(self.config)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; 0 if unknown."""
        epochs = self.config.get("epochs")
        return epochs if isinstance(epochs, int) else 0


def run_paths(path: Path) -> list[Path]:
    """Run directories: the path itself if it is one, else those in it, by name."""

    def is_run(folder: Path) -> bool:
        return (folder / "config.yaml").is_file() or bool(_network_folders(folder))

    if is_run(path) or not path.is_dir():
        return [path] if is_run(path) else []
    return sorted(folder for folder in path.iterdir() if is_run(folder))


def read_run(path: Path) -> RunFiles:
    """Read a run directory. Damaged files are listed in `problems`.

    Raises: RunDirectoryError if the path is not a run directory.
    """
    directory = RunDirectory(path)
    found = _network_folders(path)
    if not found and not directory.config.is_file():
        raise RunDirectoryError(
            f"{path} is not a run directory: it has neither config.yaml nor a log in network00 "
            "(Lightning and Transformers have their own files)"
        )
    problems: list[str] = []
    config = _read_object(directory.config, problems, yaml.safe_load)
    count = section(config, "run").get("networks")
    count = count if isinstance(count, int) and count <= _MAX_NETWORKS else 0
    # Folders beyond the count: of new jobs, or of an earlier start with more networks that failed.
    networks = sorted({*range(count), *(found if not count or _is_of_jobs(config) else ())})
    checkpoints = complete_checkpoints(directory.checkpoints)
    jobs = {} if checkpoints else job_checkpoints(path)
    checkpoints += sorted((found[-1] for found in jobs.values()), key=lambda each: each.epoch)
    paths = [directory.events, *(RunDirectory(path, job=network).events for network in networks)]
    events = [event for each in paths for event in _read_lines(each, problems)]
    return RunFiles(
        path=path,
        config=config,
        networks=[
            _read_network(directory, network, problems, jobs.get(network, ()))
            for network in networks
        ],
        events=sorted(events, key=lambda event: str(event.get("time"))),
        summary=_read_object(directory.summary, problems),
        stopped=_read_text(directory.stopped, problems),
        checkpoint=checkpoints[-1].path.name if checkpoints else None,
        checkpoint_epoch=checkpoints[-1].epoch if checkpoints else 0,
        problems=problems,
    )


def _network_folders(path: Path) -> set[int]:
    """Numbers of the networks that a run has written files for."""
    matches = (re.fullmatch(r"network(\d{2,})", folder.name) for folder in path.glob("network*"))
    return {
        int(match[1])
        for match in matches
        if match and any((path / match[0] / name).exists() for name in _OF_NETWORK)
    }


def _is_of_jobs(config: Fields) -> bool:
    """Whether each network is an independent job (graft.exchange files)."""
    return section(config, "graft").get("exchange") == "files"


def _read_network(
    directory: RunDirectory, network: int, problems: list[str], checkpoints: Sequence[Checkpoint]
) -> NetworkFiles:
    folder = directory.network(network)
    lines = _read_lines(folder / "metrics.jsonl", problems)
    epochs = [line for line in lines if isinstance(line.get("epoch"), int)]
    rounds = [rounds for line in epochs if (rounds := section(line, "graft"))]
    log = (_read_text(folder / "log.txt", problems, tail=True) or "").splitlines()
    last = next((line for line in reversed(log) if line.strip()), "")
    return NetworkFiles(
        network=network,
        status=_read_object(directory.status(network), problems),
        last_epoch=epochs[-1] if epochs else {},
        last_round=rounds[-1] if rounds else {},
        error=last.removeprefix("ERROR ") if last.startswith("ERROR ") else None,
        checkpoint=checkpoints[-1].path.name if checkpoints else None,
        lease=read_lease(RunDirectory(directory.path, job=network).lease),
    )


def read_json(path: Path) -> Any:
    """Read a JSON file, or the list of objects in a JSON Lines file.

    Raises: RunDirectoryError if the file is missing or damaged.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


def section(values: Fields, name: str) -> Fields:
    """A mapping in a mapping; empty for anything else that the file may hold."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _read_object(
    path: Path, problems: list[str], parse: Callable[[str], Any] = json.loads
) -> Fields:
    text = _read_text(path, problems)
    if text is None:
        return {}
    try:
        content = parse(text)
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path} cannot be read")
        return {}
    return {str(key): value for key, value in content.items()}  # YAML has keys of other types


def _read_lines(path: Path, problems: list[str]) -> list[Fields]:
    """Objects at the end of a JSON-lines file. An unfinished last line is ignored."""
    text = _read_text(path, problems, tail=True) or ""
    lines = [parse_line(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if damaged := lines.count(None):
        problems.append(f"{path}: {damaged} of the last {len(lines)} lines cannot be read")
    return [line for line in lines if line is not None]


def _read_text(path: Path, problems: list[str], *, tail: bool = False) -> str | None:
    """A file or, with `tail`, the complete lines at its end; None if there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - _TAIL_BYTES) if tail else 0
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return None
    if start:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")
