"""The folder of a run: what it was started with, and whether it may go on."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dist_graft.config import TrainConfig
from dist_graft.config.validation import from_nested
from dist_graft.errors import RunDirectoryError
from dist_graft.training.checkpoint.files import (
    Checkpoint,
    complete_sets,
    damage,
    declared_sets,
    write_atomically,
)
from dist_graft.version import versions

_FREE = (
    *("run_dir", "resume", "checkpoint.", "monitor.", "runtime.timeout_"),
    "data.skip_broken",  # a run without it ends at the first broken image, before it matters
)
_SCHEDULES_WITHOUT_END = ("constant", "step")


class RunDirectory:
    """Paths of a run, and the rules for starting in a folder that is not empty."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """Resolved configuration, versions, git commit."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoint sets."""
        return self.path / "checkpoints"

    @property
    def population(self) -> Path:
        """Rank 0's view of all networks."""
        return self.path / "population"

    @property
    def summary(self) -> Path:
        """Final accuracies."""
        return self.path / "summary.json"

    @property
    def events(self) -> Path:
        """What happened beside the training, one JSON line an event."""
        return self.population / "events.jsonl"

    @property
    def stop(self) -> Path:
        """A file of this name asks the run to stop."""
        return self.path / "STOP"

    @property
    def stopped(self) -> Path:
        """Says that the run stopped early and goes on when it is started again."""
        return self.path / "STOPPED_EARLY"

    def network(self, network: int) -> Path:
        """What one network writes: log, metrics, events."""
        return network_folder(self.path, network)

    def status(self, network: int) -> Path:
        """Where one network stands right now."""
        return self.network(network) / "status.json"

    def check(self, config: TrainConfig, networks: int) -> None:
        """Refuse to start here when the folder holds another run, or `resume` forbids it.

        Raises: RunDirectoryError that says what differs and what to do.
        """
        try:
            started = self.config.exists()
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be read: {error.strerror}; choose another run_dir"
            ) from error
        if config.resume == "must" and not complete_sets(self.checkpoints):
            raise RunDirectoryError(
                f"{self.path} holds no complete checkpoint set to go on from (--resume must)"
            )
        if config.resume == "never" and started:
            raise RunDirectoryError(
                f"{self.path} already holds a run (--resume never): choose another run_dir"
            )
        if not started:
            return
        try:
            stored = yaml.safe_load(self.config.read_text())
            before = dict(_flat({key: stored[key] for key in stored if key != "run"}))
            before_networks = stored["run"]["networks"]
        except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise RunDirectoryError(
                f"{self.config} cannot be read ({error}): choose another run_dir"
            ) from error
        if before_networks != networks:
            replicas = int(before.get("runtime.replicas", 1))
            together = f" with --runtime.replicas {replicas}" if replicas > 1 else ""
            raise RunDirectoryError(
                f"{self.path} holds a run of {before_networks} networks, and "
                f"{networks * config.runtime.replicas} processes were started: start "
                f"{before_networks * replicas}{together}, or choose another run_dir"
            )
        differences = [
            f"{name} was {before.get(name)!r} and is now {value!r}"
            for name, value in _flat(_plain(config))
            if before.get(name) != value and not name.startswith(_FREE) and name != "epochs"
        ]
        if differences:
            raise RunDirectoryError(
                f"{self.path} holds a run with another configuration: {'; '.join(differences)}; "
                "give the same options, or choose another run_dir"
            )
        self._check_epochs(int(before["epochs"]), config)

    def forget_stop(self) -> None:
        """Drop the requests to stop, and the marker, that an earlier start has left."""
        for path in (self.stop, self.stopped):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _check_epochs(self, before: int, config: TrainConfig) -> None:
        if config.epochs < before:
            raise RunDirectoryError(
                f"{self.path} holds a run of {before} epochs, more than --epochs {config.epochs}: "
                "choose another run_dir"
            )
        if config.epochs > before and config.optim.schedule not in _SCHEDULES_WITHOUT_END:
            raise RunDirectoryError(
                f"{self.path} holds a run of {before} epochs, and the {config.optim.schedule} "
                f"schedule depends on their number: --epochs {config.epochs} needs another run_dir"
            )

    def describe(self, config: TrainConfig, networks: int) -> None:
        """Write config.yaml."""
        run = {"networks": networks, "versions": versions(), "git_commit": git_commit()}
        text = yaml.safe_dump(_plain(config) | {"run": run}, sort_keys=False)
        write_atomically(self.config, text.encode())

    def read(self) -> tuple[TrainConfig, int]:
        """What the run was started with, and its number of networks.

        Raises: RunDirectoryError when there is no run here, or config.yaml is not one of ours.
        """
        if not self.config.is_file():
            raise RunDirectoryError(f"{self.path} is no run directory: it has no config.yaml")
        try:
            stored = yaml.safe_load(self.config.read_text())
            networks = int(stored.pop("run")["networks"])
            return from_nested(TrainConfig, stored), networks
        except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise RunDirectoryError(f"{self.config} cannot be read ({error})") from error

    def newest_usable(self) -> tuple[Checkpoint | None, list[Path]]:
        """The newest complete set whose files are whole, and the damaged files of newer ones.

        Raises: RunDirectoryError when there are complete sets and none is usable.
        """
        damaged: list[Path] = []
        for checkpoint in reversed(declared_sets(self.checkpoints)):
            path = damage(checkpoint)
            if path is None:
                return checkpoint, damaged
            damaged.append(path)
        if damaged:
            raise RunDirectoryError(
                f"no checkpoint set of {self.path} is usable: {damaged[0]} is missing or damaged; "
                "restore it, or choose another run_dir"
            )
        return None, []


def network_folder(path: Path, network: int) -> Path:
    """Folder of one network in a run directory."""
    return path / f"network{network:02d}"


def git_commit() -> str | None:
    """Commit of the source tree that this package was loaded from; None when there is no git."""
    describe = ("describe", "--always", "--dirty", "--abbrev=40")
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *describe],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # an image without git
        return None
    return answer.stdout.strip() or None


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As YAML can hold it: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
