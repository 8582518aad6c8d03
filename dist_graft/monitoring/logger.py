"""Loggers by name: Weights & Biases, MLflow, trackio, or a user-defined one.

Their packages (extra "loggers") are imported only when a logger is used.
"""

from __future__ import annotations

import contextvars
import fcntl
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, cast

from dist_graft.config.validation import own
from dist_graft.errors import ConfigError
from dist_graft.references import is_reference

Status = Literal["finished", "stopped", "failed"]
"""How a run ended: complete, stopped with a checkpoint, or with an error."""

_PROJECT = "dist_graft"
_OFFLINE = ("offline", "dryrun", "disabled")  # modes of W&B without an account
_MAX_BATCH = 1000  # metrics that MLflow accepts in one request
_MAX_PARAMETERS = 100
_MAX_VALUE = 6000  # characters of a parameter


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """Description of a run for a logger: one network, or the population."""

    id: str
    """Unique among all runs; the same when the run is resumed. Letters, digits, "-", "_", "."."""
    group: str
    """Shared by the networks of a population and the population itself."""
    config: Mapping[str, Any]
    """All options by dotted name, including those of the network."""
    tags: Mapping[str, str]
    """method, K, data, model."""
    folder: Path
    """Run directory, for local files."""


class Logger(Protocol):
    """Reports one network, or the population, to a service.

    A factory `(run: LoggedRun) -> Logger` creates it. A resumed run has the same id, and continues
    in the service. All calls come from one background thread, so they may be slow. The first
    exception is logged as a warning, and turns the logger off.
    """

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Report the results of an epoch (0-based) by tag; final results are a second call."""

    def finish(self, status: Status) -> None:
        """Close the run. Another process may resume it."""


class WandbLogger:
    """A run of Weights & Biases. WANDB_DIR, WANDB_MODE and WANDB_PROJECT apply."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        offline = wandb.setup(wandb.Settings(silent=True)).settings.mode in _OFFLINE
        if not (offline or wandb.run or wandb.login(prompt=False, verify=False)):
            raise ConfigError("it needs an API key: run wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.id,
            group=run.group,
            tags=[f"{name}={value}"[:64] for name, value in run.tags.items()],
            config=dict(run.config),
            allow_val_change=True,
            dir=os.environ.get("WANDB_DIR", run.folder),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", symlink=False),
        )

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(scalars), step=epoch)

    def finish(self, status: Status) -> None:
        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MlflowLogger:
    """A run of MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply.

    The run is found by its tag `dist_graft.run`, since the server chooses the ids of runs.
    """

    def __init__(self, run: LoggedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        _raise_level("mlflow", "alembic")
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            self._client = MlflowClient(uri)
            experiment = self._experiment(None)
        else:
            folder = run.folder.absolute() / "mlflow"
            folder.mkdir(exist_ok=True)
            with (folder / "lock").open("w") as lock:  # creating the tables twice fails
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}?timeout=60")
                experiment = self._experiment(f"file://{folder}/artifacts")
        found = self._client.search_runs([experiment], f"tags.`dist_graft.run` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"dist_graft.run": run.id, "group": run.group, **run.tags}
        created = self._client.create_run(experiment, run_name=run.id, tags=tags)
        self._id = created.info.run_id
        parameters = [Param(name, str(value)[:_MAX_VALUE]) for name, value in run.config.items()]
        for first in range(0, len(parameters), _MAX_PARAMETERS):
            part = parameters[first : first + _MAX_PARAMETERS]
            self._client.log_batch(self._id, params=part)

    def _experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        if not (found := self._client.get_experiment_by_name(name)):
            try:
                return str(self._client.create_experiment(name, artifacts))
            except MlflowException:  # another network has just created it
                found = self._client.get_experiment_by_name(name)
                if not found:
                    raise
        return str(found.experiment_id)

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, epoch) for tag, value in scalars.items()]
        for first in range(0, len(metrics), _MAX_BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MAX_BATCH])

    def finish(self, status: Status) -> None:
        ended = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self._id, ended[status])


class TrackioLogger:
    """A run of trackio. TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL apply.

    trackio reads TRACKIO_DIR once per process, when `logger_factory` imports it.
    """

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        # trackio finishes the current run of the context before it starts another one.
        with _quiet():
            self._run = contextvars.Context().run(
                trackio.init,
                project=_PROJECT,
                name=run.id,
                group=run.group,
                config={**run.config, "tags": dict(run.tags)},
                resume="allow",
                embed=False,
            )

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(scalars), step=epoch)

    def finish(self, status: Status) -> None:
        with _quiet():
            self._run.finish()


_SERVICES: dict[str, Callable[[LoggedRun], Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


def logger_factory(name: str, folder: Path) -> Callable[[LoggedRun], Logger]:
    """Import the package of a logger, and return the function that creates the logger.

    The import must not be in the logger's thread: a child process forked during an import can hang.

    Args:
        name: built-in logger or package.module:Name.
        folder: run directory; trackio reads its folder when it is imported.

    Raises: ConfigError if package.module:Name does not exist; ImportError from the package.
    """
    if is_reference(name):
        return own("monitor.loggers", name)
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))
    importlib.import_module(name)
    return _SERVICES[name]


def check_loggers(names: Sequence[str]) -> None:
    """Check that this process can use the loggers, before anything is written.

    Raises: ConfigError if a package is missing, or package.module:Name does not exist.
    """
    for name in names:
        if is_reference(name):
            own("monitor.loggers", name)
        elif name in _SERVICES:
            for package in _packages(name):
                spec = importlib.util.find_spec(package)
                if spec is None or spec.origin is None:  # a plain folder has no origin
                    raise ConfigError(
                        f"monitor.loggers {name} needs the package {package}: pip install "
                        "'dist_graft[loggers]'"
                    )


def _packages(name: str) -> tuple[str, ...]:
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return ("mlflow", "sqlalchemy", "alembic")
    return (name,)


def _raise_level(*names: str) -> None:
    """Silence loggers of `logging` below the level of warnings."""
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what this thread prints to standard output."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _WithoutThread(before, threading.get_ident()))
    try:
        yield
    finally:
        sys.stdout = before


class _WithoutThread:
    """A stream that drops what one thread writes."""

    def __init__(self, stream: TextIO, thread: int) -> None:
        self._stream = stream
        self._thread = thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
