"""Paths of a run directory, its configuration file, and whether a run may start or resume in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dist_graft.config import TrainConfig
from dist_graft.config.members import differing_options, member_options
from dist_graft.config.train import is_named_weights
from dist_graft.config.validation import from_nested, require
from dist_graft.errors import RunDirectoryError
from dist_graft.version import versions

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of `os.link` on a disk without hard links."""
_CHANGEABLE = (
    *("run_dir", "resume", "resume_networks", "callbacks"),
    *("checkpoint.", "monitor.", "population."),
    *("data.root", "data.workers", "data.download", "graft.bucket_mb", "graft.wait_seconds"),
    *("runtime.timeout_", "runtime.threads"),
    "data.skip_broken",  # without it the run ends at the first broken image
)
"""Options that may differ when a run is resumed: names and prefixes of names."""
_PER_NETWORK = ("optim.lrs", "members")
"""Options with one value for each network."""
_UNREADABLE = (
    *(OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError, OverflowError),
    *(RecursionError, IndexError),
)
"""Errors of reading a config.yaml that is missing or invalid."""
OPEN_ENDED_SCHEDULES = ("constant", "step")
"""Schedules that do not depend on the number of epochs."""


def network_name(network: int) -> str:
    """Name of a network's folder, and of its files without suffix."""
    return f"network{network:02d}"


class RunDirectory:
    """Paths of a run, and the checks before a run starts or resumes there.

    Args:
        path: of the run.
        job: network of a job that trains it on its own (graft.exchange files): what the networks
            otherwise have in common is then in the folder of this network.
    """

    def __init__(self, path: str | Path, *, job: int | None = None) -> None:
        self.path = Path(path)
        self.job = job

    @property
    def own(self) -> Path:
        """Folder of what the networks have in common, or of the job's network."""
        return self.path if self.job is None else self.network(self.job)

    @property
    def config(self) -> Path:
        """Resolved configuration, versions, git commit."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.own / "checkpoints"

    @property
    def population(self) -> Path:
        """Rank 0's view of all networks."""
        return self.path / "population"

    @property
    def summary(self) -> Path:
        """Final accuracies."""
        return self.path / "summary.json"

    @property
    def classes(self) -> Path:
        """Names of the classes, and how test images are prepared."""
        return self.path / "classes.json"

    @property
    def loggers(self) -> Path:
        """Name of the population for `monitor.loggers`."""
        return self.path / "loggers.json"

    @property
    def lease(self) -> Path:
        """Lease of the process that writes the files of the run or job (ADR 40)."""
        return self.own / "lease.json"

    @property
    def summary_job(self) -> Path:
        """Final accuracies of a job's network."""
        return self.own / "summary.json"

    @property
    def events(self) -> Path:
        """Notable events, one JSON line per event."""
        return (self.population if self.job is None else self.own) / "events.jsonl"

    @property
    def stop(self) -> Path:
        """Creating this file asks the run to stop; all jobs, if each network is one."""
        return self.path / "STOP"

    @property
    def stop_job(self) -> Path:
        """Creating this file asks one job to stop."""
        return self.own / "STOP"

    @property
    def stopped(self) -> Path:
        """Marker of a run or job that stopped early and can be resumed."""
        return self.own / "STOPPED_EARLY"

    def network(self, network: int) -> Path:
        """Folder of one network: log, metrics, events, status."""
        return self.path / network_name(network)

    def metrics(self, network: int) -> Path:
        """Metrics of one network, one JSON line per epoch."""
        return self.network(network) / "metrics.jsonl"

    def status(self, network: int) -> Path:
        """Current state of one network."""
        return self.network(network) / "status.json"

    def before_last_round(self, network: int) -> Path:
        """Weights of one network before the last round (checkpoint.before_last_round)."""
        return self.network(network) / "before_last_round.pt"

    def check(self, config: TrainConfig, networks: int, *, changes: bool = False) -> None:
        """Refuse to start when the folder holds another run, or when `resume` forbids it.

        Args:
            config: of the run.
            networks: number of networks that were started.
            changes: whether the run continues with other networks (resume_networks).

        Raises: RunDirectoryError that lists the differences and says what to do.
        """
        try:
            started = self.config.exists()
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be read: {error.strerror}; choose another run_dir"
            ) from error
        began = started if self.job is None else self.metrics(self.job).exists()
        if config.resume == "never" and began:
            raise RunDirectoryError(
                f"{self.path} already holds a run (--resume never): choose another run_dir"
            )
        if not started:
            return
        try:
            stored = self._read()
            before_networks, before_epochs = int(stored.pop("run")["networks"]), stored["epochs"]
            # Runs of older versions lack newer options.
            before = dict(flatten(as_plain(TrainConfig()))) | dict(flatten(stored))
            replicas = int(before["runtime.replicas"])
            require(isinstance(before_epochs, int), "epochs", before_epochs, "a whole number")
        except _UNREADABLE as error:
            raise self._cannot_be_read(error) from error
        files = config.graft.exchange == "files"
        grows = files and networks > before_networks
        changeable: tuple[str, ...] = _CHANGEABLE
        if changes:
            changeable += _PER_NETWORK
        elif before_networks != networks and not grows:
            option = f" with --runtime.replicas {replicas}" if replicas > 1 else ""
            raise RunDirectoryError(
                f"{self.path} holds a run of {before_networks} networks, but "
                f"{networks * config.runtime.replicas} processes were started: start "
                f"{before_networks * replicas}{option}, name the networks to continue "
                "(--resume_networks), or choose another run_dir"
                if not files
                else f"{self.path} holds a population of {before_networks} networks, more than "
                f"population.size {networks}: pass --population.size {before_networks}, or choose "
                "another run_dir"
            )
        differences = [
            f"{name} was {before.get(name)!r} and is now {value!r}"
            for name, value in flatten(as_stored(config))
            if before.get(name) != value
            and not name.startswith(changeable)
            and name != "epochs"
            and not (grows and name in _PER_NETWORK and _starts_with(value, before.get(name)))
            and (name != "graft.exchange" or "files" in (before.get(name), value))
        ]
        if differences:
            raise RunDirectoryError(
                f"{self.path} holds a run with a different configuration: "
                f"{'; '.join(differences)}; pass the same options, or choose another run_dir"
            )
        self._check_epochs(before_epochs, config)
        own_rates = config.optim.lrs is not None or "optim.lr" in differing_options(config)
        if grows and own_rates and config.graft.qsr_alpha is not None:
            raise RunDirectoryError(
                f"{self.path} holds a population of {before_networks} networks, and with "
                "graft.qsr_alpha, the learning rates of further ones would move its rounds: "
                "population.size must stay as it is, or choose another run_dir"
            )

    def clear_stop(self) -> None:
        """Remove the stop request and marker of an earlier start.

        A job keeps the request to all jobs; others may not have seen it yet.
        """
        for path in (self.stop_job, self.stopped):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def write_config(
        self, config: TrainConfig, networks: int, custom: Collection[str] = ()
    ) -> None:
        """Write config.yaml; of several jobs, the first one, or one with more networks or epochs.

        Args:
            config: of the run.
            networks: size of the population.
            custom: what was passed to the Trainer in Python: "model", "data", "loss", ...
        """
        members = [member_options(config, network) for network in range(networks)]
        run = {
            "networks": networks,
            **({"members": _plain(members)} if any(members) else {}),
            "custom": list(custom),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        content = yaml.safe_dump(as_stored(config) | {"run": run}, sort_keys=False).encode()
        if self.job is None:
            write_atomically(self.config, content)
            return
        try:
            write_atomically(self.config, content, exclusive=True)
        except FileExistsError:
            self.check(config, networks)  # another job may just have written it
            before, before_networks = self.read_config()
            if (before.epochs, before_networks) != (config.epochs, networks):
                write_atomically(self.config, content)

    def write_classes(self, classes: Sequence[str], preprocessing: Mapping[str, Any]) -> None:
        """Write classes.json; all processes of a run have the same content."""
        content = {"classes": list(classes), "preprocessing": dict(preprocessing)}
        write_atomically(self.classes, (json.dumps(content, indent=1) + "\n").encode())

    def read_classes(self) -> list[str] | None:
        """Names in classes.json; None without the file.

        Raises: RunDirectoryError if it is damaged.
        """
        try:
            return list(map(str, json.loads(self.classes.read_text())["classes"]))
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            raise RunDirectoryError(
                f"{self.classes} cannot be read ({error}): restore or remove it"
            ) from error

    def read_config(self) -> tuple[TrainConfig, int]:
        """Return the configuration and the number of networks of the run.

        Raises: RunDirectoryError when there is no run here, or config.yaml is not valid.
        """
        if not self.config.is_file():
            raise RunDirectoryError(f"{self.path} is not a run directory: it has no config.yaml")
        try:
            stored = self._read()
            networks = int(stored.pop("run")["networks"])
            return from_nested(TrainConfig, stored), networks
        except _UNREADABLE as error:
            raise self._cannot_be_read(error) from error

    def read_custom(self) -> list[str]:
        """What was passed to the Trainer in Python; empty for a run of the command line."""
        try:
            return list(map(str, self._read()["run"].get("custom", ())))
        except _UNREADABLE as error:
            raise self._cannot_be_read(error) from error

    def _read(self) -> dict[str, Any]:
        """Content of config.yaml; raises one of `_UNREADABLE` if it is damaged."""
        stored = yaml.safe_load(self.config.read_text())
        if not isinstance(stored, dict) or not isinstance(stored.get("run"), dict):
            raise ValueError("it is not the configuration of a run")
        return stored

    def _cannot_be_read(self, error: BaseException) -> RunDirectoryError:
        cause = " ".join(str(error).split()) or type(error).__name__
        return RunDirectoryError(
            f"{self.config} cannot be read ({cause}): restore it, or choose another run_dir"
        )

    def _check_epochs(self, before: int, config: TrainConfig) -> None:
        if config.epochs < before:
            raise RunDirectoryError(
                f"{self.path} holds a run of {before} epochs, more than --epochs {config.epochs}: "
                "choose another run_dir"
            )
        optim = config.optim
        if (
            config.epochs > before
            and optim.schedule not in OPEN_ENDED_SCHEDULES
            and optim.schedule_epochs is None
        ):
            raise RunDirectoryError(
                f"{self.path} holds a run of {before} epochs, and the {optim.schedule} schedule "
                f"depends on the number of epochs unless optim.schedule_epochs was set: --epochs "
                f"{config.epochs} needs another run_dir"
            )
        if config.epochs > before and config.graft.qsr_alpha is not None:
            raise RunDirectoryError(
                f"{self.path} holds a run of {before} epochs, and graft.qsr_alpha adds a round "
                f"after the last one: --epochs {config.epochs} needs another run_dir"
            )


def _starts_with(longer: Any, shorter: Any) -> bool:
    """Whether both are lists, and the longer one only adds to the shorter one."""
    if not isinstance(longer, list) or not isinstance(shorter, list):
        return False
    return bool(shorter) and longer[: len(shorter)] == shorter


@contextlib.contextmanager
def atomic_path(path: Path, *, exclusive: bool = False, durable: bool = True) -> Iterator[Path]:
    """Replace a file atomically: a reader sees its old content or all of the new one.

    Yields a temporary path in the same folder, which the block must write. After the block the file
    gets its final name; on an error, it is removed.

    Args:
        path: of the file; missing folders are created.
        exclusive: whether to fail if the file exists.
        durable: whether the file must survive a crash of the machine.

    Raises: OSError; FileExistsError if `exclusive` and the file exists.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        if exclusive:
            _link(temporary, path)
        else:
            temporary.replace(path)
        if durable:
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or its only one on a disk without hard links.

    Without hard links, the last one of several processes that come at the same moment wins.

    Raises: FileExistsError if the target exists.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if target.exists():
            raise FileExistsError(f"{target} exists") from error
        source.replace(target)


def _sync(path: Path) -> None:
    """Write what the system caches of a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(
    path: Path, content: bytes | memoryview, *, exclusive: bool = False, durable: bool = True
) -> None:
    """Replace a file's content atomically.

    Args:
        path: of the file.
        content: of the file.
        exclusive: as in `atomic_path`.
        durable: as in `atomic_path`.

    Raises: RunDirectoryError naming the file, on a disk error; FileExistsError if `exclusive` and
        the file exists.
    """
    try:
        with atomic_path(path, exclusive=exclusive, durable=durable) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if exclusive and isinstance(error, FileExistsError):
            raise
        raise RunDirectoryError.not_written(path, error) from error


def git_commit() -> str | None:
    """Commit of the source tree that this package was imported from; None without git.

    Ends in "-dirty" if files of the package differ from the commit; other files do not count.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit = git("describe", "--always", "--abbrev=40")
        changed = git("status", "--porcelain", "--", ".")
    except FileNotFoundError:  # an image without git
        return None
    return f"{commit}{'-dirty' if changed else ''}" if commit else None


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML can hold it: tuples become lists."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def as_stored(config: TrainConfig) -> dict[str, Any]:
    """The configuration with absolute paths, which are valid in any working directory."""
    plain = as_plain(config)
    if "://" not in config.data.root:  # an address that a function of the user's reads
        plain["data"]["root"] = str(Path(config.data.root).absolute())
    if config.init_from and not is_named_weights(config.init_from):
        plain["init_from"] = str(Path(config.init_from).absolute())
    return plain


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every option of nested sections.

    Arguments of a user's function (``model.kwargs``) are a value, as is a mapping with dotted names
    (``diversity``).
    """
    for key, value in tree.items():
        is_section = isinstance(value, Mapping) and value and not key.endswith("kwargs")
        if is_section and not any("." in str(name) for name in value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
