"""How long a process waits for loggers that hang, at the end of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_trainer import FakeTrainer

from dist_graft.config import CheckpointConfig, TrainConfig
from dist_graft.errors import StoppedEarlyError
from dist_graft.monitoring.logger import LoggedRun, Status
from dist_graft.monitoring.run_loggers import RunLoggers
from dist_graft.population.runtime.stop_requests import GracePeriod, StopRequests

GRACE = 20.0
"""checkpoint.grace_seconds; a tenth of it is kept for the exit."""


class Hanging:
    """A logger whose service does not answer at the end."""

    on_finish: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, run: LoggedRun) -> None:
        del run

    def finish(self, status: Status) -> None:
        del status
        self.on_finish()
        threading.Event().wait()


@pytest.mark.parametrize("when", ["before the end", "during the wait"])
def test_the_wait_ends_before_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    expired = threading.Event()
    grace = GracePeriod(4.0, expired.set)  # the rest of GRACE, after saving
    config = TrainConfig(checkpoint=CheckpointConfig(grace_seconds=GRACE))
    fake = FakeTrainer(tmp_path, config, stop_requests=StopRequests([], None, grace=grace))
    loggers = RunLoggers([f"{__name__}:Hanging"])
    loggers.on_fit_start(fake.trainer)
    if when == "before the end":
        grace.start()
        loggers.on_exception(fake.trainer, StoppedEarlyError())
    else:
        monkeypatch.setattr(Hanging, "on_finish", staticmethod(grace.start))
        loggers.on_fit_end(fake.trainer)
    loggers.teardown(fake.trainer)
    grace.cancel()
    assert not expired.is_set()
