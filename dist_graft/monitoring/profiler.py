"""Profiles some steps of a run with torch.profiler."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from dist_graft.config.validation import step_range
from dist_graft.errors import ConfigError
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.printing import format_table

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer

_OPERATIONS = 8


class Profiler(Callback):
    """Profiles steps of one network, and everything between them, into trace.json.gz.

    Args:
        steps: "A:B" profiles the optimizer steps A to B - 1 of the run, counted from 0.
    """

    def __init__(self, steps: str) -> None:
        self._first, self._last = step_range("monitor.profile_steps", steps)
        self._profiler: profile | None = None
        self._started = 0.0
        self._started_at = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        steps = trainer.config.epochs * trainer.steps_per_epoch
        if self._first >= steps:
            raise ConfigError(
                f"monitor.profile_steps starts at step {self._first}, but the run has steps 0 to "
                f"{steps - 1}"
            )

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._update(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        # What follows the last step of an epoch is profiled only if an earlier step was.
        if trainer.step < trainer.steps_per_epoch or self._profiler is not None:
            self._update(trainer)

    def teardown(self, trainer: Trainer) -> None:
        self._finish(trainer)

    def _update(self, trainer: Trainer) -> None:
        """Start or finish before the next step."""
        done = trainer.global_step
        if done >= self._last:
            self._finish(trainer)
        elif self._profiler is None and done >= self._first and trainer.process.is_leader:
            self._start(trainer.device, done)

    def _start(self, device: torch.device, done: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's own log
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            torch.accelerator.synchronize(device)
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()
        self._started, self._started_at = time.perf_counter(), done

    def _finish(self, trainer: Trainer) -> None:
        """Write the trace and log a table, if a profile is being recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize(trainer.device)
        seconds = time.perf_counter() - self._started
        profiler.stop()
        path = trainer.directory.network(trainer.process.network) / "trace.json.gz"
        _export(profiler, path, trainer)
        trainer.log.info(
            "profile of steps %d to %d (%.2f s) in %s; open it in https://ui.perfetto.dev\n%s",
            *(self._started_at, trainer.global_step - 1, seconds, path),
            _table(profiler, seconds, on_gpu=trainer.device.type == "cuda"),
        )


def _export(profiler: profile, path: Path, trainer: Trainer) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        trainer.log.warning("the profile %s cannot be written: %s", path, error)


def _table(profiler: profile, seconds: float, *, on_gpu: bool) -> str:
    """Time by phase, and self time of the most expensive operations."""
    averages = list(profiler.key_averages())
    phases = {event.key: event for event in averages if event.key in PHASES}
    rows = [
        (phase, str(phases[phase].count), *_cells(phases[phase].cpu_time_total, seconds))
        for phase in PHASES
        if phase in phases
    ]

    def self_time(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    operations = [event for event in averages if event.key not in PHASES]
    rows += [
        (event.key[:48], str(event.count), *_cells(self_time(event), seconds))
        for event in sorted(operations, key=self_time, reverse=True)[:_OPERATIONS]
    ]
    return format_table(("phase, or operation (self time)", "calls", "ms", "% of time"), rows)


def _cells(microseconds: float, seconds: float) -> tuple[str, str]:
    return f"{microseconds / 1e3:.1f}", f"{microseconds / 1e4 / seconds:.1f}"
