"""The callback that runs the loggers of `monitor.loggers` in background threads."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dist_graft.errors import RunDirectoryError, StoppedEarlyError
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.logger import LoggedRun, Logger, Status, logger_factory
from dist_graft.monitoring.scalars import (
    Scalars,
    final_network_scalars,
    final_population_scalars,
    network_scalars,
    population_scalars,
)
from dist_graft.run_directory import (
    RunDirectory,
    as_stored,
    flatten,
    network_name,
    write_atomically,
)

if TYPE_CHECKING:
    from dist_graft.monitoring.metrics import EpochReport
    from dist_graft.training.trainer import Trainer

_FINISH_SECONDS = 60.0
"""Time limit for the loggers to send the rest, at the end of a complete run."""


class RunLoggers(Callback):
    """Reports this process's network and, on rank 0, the population.

    Each logger has its own thread, so a slow or failing service never delays training. Jobs
    (graft.exchange files) do not know the other networks' results, and report only their own.

    Args:
        names: loggers, without tensorboard.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._threads: list[_LoggerThread] = []
        self._status: Status = "failed"

    def on_fit_start(self, trainer: Trainer) -> None:
        try:
            runs = logged_runs(trainer)
        except RunDirectoryError as error:
            trainer.log.warning("%s; training continues without monitor.loggers", error)
            return
        for name in self._names:
            try:
                create = logger_factory(name, trainer.directory.path)
            except ImportError as error:
                _warn(trainer.log, name, error)
            else:
                self._threads.append(_LoggerThread(name, create, runs, trainer.log))

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        network = network_scalars(report.metrics, report.layers)
        self._log(report.metrics.epoch, network, population_scalars(report))

    def on_fit_end(self, trainer: Trainer) -> None:
        self._status = "finished"
        if summary := trainer.summary:
            network = final_network_scalars(summary, trainer.process.network)
            self._log(trainer.config.epochs - 1, network, final_population_scalars(summary))

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self._status = "stopped" if isinstance(error, StoppedEarlyError) else "failed"

    def teardown(self, trainer: Trainer) -> None:
        if trainer.lease_lost:  # the run continues in another process
            return
        grace = trainer.config.checkpoint.grace_seconds
        margin = grace / 10  # for the process to exit after the wait
        seconds = _FINISH_SECONDS if self._status == "finished" else grace / 4
        deadline = time.monotonic() + seconds

        def seconds_left() -> float:  # a stop may also be requested during the wait
            return min(deadline - time.monotonic(), trainer.stop_requests.seconds_left - margin)

        for thread in self._threads:
            thread.finish(self._status)
        for thread in self._threads:
            thread.join(seconds_left, margin)

    def _log(self, epoch: int, network: Scalars, population: Scalars) -> None:
        for thread in self._threads:
            thread.log([network, population], epoch)


def logged_runs(trainer: Trainer) -> list[LoggedRun]:
    """Return the runs that this process reports: its network, and on rank 0 the population.

    Raises: RunDirectoryError if RUN/loggers.json cannot be read or written.
    """
    directory, process = trainer.directory, trainer.process
    group = _group(directory)
    tags = {
        "method": trainer.config.method,
        "K": str(process.networks),
        "data": "custom" if "data" in trainer.custom else trainer.config.data.name,
        "model": trainer.model_name,
    }
    # After resume_networks, a number stands for another network.
    changes = sum(1 for _ in directory.path.glob("before_*"))
    suffix = f"-{changes + 1}" if changes else ""
    own = {"network": process.network, "lr": trainer.max_lr, **_options(trainer, own=True)}
    configs = {network_name(process.network): own}
    if process.is_main and directory.job is None:
        configs["population"] = _options(trainer, own=False)
    common: dict[str, Any] = {"group": group, "tags": tags, "folder": directory.path}
    return [
        LoggedRun(id=f"{group}-{name}{suffix}", config=config, **common)
        for name, config in configs.items()
    ]


def _options(trainer: Trainer, *, own: bool) -> dict[str, Any]:
    config = trainer.member_config if own else trainer.config
    return {"networks": trainer.process.networks, **dict(flatten(as_stored(config)))}


def _group(directory: RunDirectory) -> str:
    """Return the name of the population in all loggers, from RUN/loggers.json.

    The first process writes the file; the others, and a resumed run, read it.
    """
    path = directory.loggers
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", directory.path.absolute().name)[:32]
    content = json.dumps({"group": f"{name}-{secrets.token_hex(4)}"}) + "\n"
    with contextlib.suppress(FileExistsError):
        write_atomically(path, content.encode(), exclusive=True)
    try:
        return str(json.loads(path.read_text())["group"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


class _LoggerThread:
    """The loggers of one name, fed from a queue.

    Args:
        name: as in `monitor.loggers`.
        create: creates the logger of a run.
        runs: what this process reports.
        log: for a warning when a logger fails.
    """

    def __init__(
        self,
        name: str,
        create: Callable[[LoggedRun], Logger],
        runs: Sequence[LoggedRun],
        log: logging.Logger,
    ) -> None:
        self._name = name
        self._create = create
        self._runs = runs
        self._trainer_log = log
        self._calls: queue.SimpleQueue[Callable[[list[Logger]], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def log(self, scalars: Sequence[Scalars], epoch: int) -> None:
        """Report one mapping for each run; never waits."""

        def call(loggers: list[Logger]) -> None:
            for logger, values in zip(loggers, scalars, strict=False):  # no population: one run
                if values:
                    logger.log(values, epoch)

        self._calls.put(call)

    def finish(self, status: Status) -> None:
        """Close the runs after all earlier calls."""

        def call(loggers: list[Logger]) -> None:
            for logger in loggers:
                logger.finish(status)

        self._calls.put(call)
        self._calls.put(None)

    def join(self, seconds_left: Callable[[], float], interval: float) -> None:
        """Wait for the thread until the time limit, which is polled at each interval."""
        while self._thread.is_alive() and (left := seconds_left()) > 0:
            self._thread.join(min(left, interval))
        if self._thread.is_alive():
            self._trainer_log.warning(
                "monitor.loggers %s did not finish in time and may lack the last results; "
                "metrics.jsonl has them",
                self._name,
            )

    def _work(self) -> None:
        try:
            loggers = [self._create(run) for run in self._runs]
            while call := self._calls.get():
                call(loggers)
        except Exception as error:  # noqa: BLE001  from a service or a user's logger
            _warn(self._trainer_log, self._name, error)


def _warn(log: logging.Logger, name: str, error: Exception) -> None:
    text = " ".join(str(error).split())[:300]
    log.warning(
        "monitor.loggers %s failed and is now off (%s: %s); training continues",
        *(name, type(error).__name__, text),
    )
