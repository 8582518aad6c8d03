"""Some steps of a run under torch's profiler."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_graft.errors import ConfigError
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.monitoring.console import table

_OPERATIONS = 8


class StepProfile:
    """Profiles one network from one step of the run to another, with all that happens between.

    Args:
        first: step before which it begins.
        last: number of finished steps at which it ends, if the run does not end earlier.
        path: of the trace.
        device: that the network lives on.
        log: gets a table of where the time went.
    """

    def __init__(
        self, first: int, last: int, path: Path, device: torch.device, log: logging.Logger
    ) -> None:
        self._first, self._last = first, last
        self._path = path
        self._device = device
        self._log = log
        self._done = self._until = self._began_at = 0
        self._began = 0.0
        self._profiler: profile | None = None

    def check(self, steps: int) -> None:
        """Raise ConfigError when the run has fewer steps."""
        if self._first >= steps:
            raise ConfigError(
                f"monitor.profile_steps begins at step {self._first}, and the run has the steps 0 "
                f"to {steps - 1}"
            )

    def go_on(self, done: int, until: int) -> None:
        """So many steps of the run are finished, and those before `until` follow at once."""
        self._done, self._until = done, until
        self._look()

    def step(self) -> None:
        """One more step is finished."""
        self._done += 1
        self._look()

    def finish(self) -> None:
        """Write the trace and the table, when a profile is under way."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        profiler.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            self._log.warning("the profile %s cannot be written: %s", self._path, error)
        self._log.info(
            "profile of the steps %d to %d (%.2f s) in %s, to be opened in https://ui.perfetto.dev"
            "\n%s",
            *(self._began_at, self._done - 1, seconds, self._path, self._text(profiler, seconds)),
        )

    def _look(self) -> None:
        if self._done >= self._last:
            self.finish()
        elif self._profiler is None and self._first <= self._done < self._until:
            self._start()

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its stages are of no use to the reader
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            torch.accelerator.synchronize(self._device)
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._began, self._began_at = time.perf_counter(), self._done

    def _text(self, profiler: profile, seconds: float) -> str:
        averages = list(profiler.key_averages())
        on_device = self._device.type == "cuda"
        phases = {event.key: event for event in averages if event.key in PHASES}
        rows = [
            (phase, str(phases[phase].count), *_cells(phases[phase].cpu_time_total, seconds))
            for phase in PHASES
            if phase in phases
        ]

        def own(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
            time_us = event.self_device_time_total if on_device else event.self_cpu_time_total
            return float(time_us)

        operations = [event for event in averages if event.key not in PHASES]
        rows += [
            (event.key[:48], str(event.count), *_cells(own(event), seconds))
            for event in sorted(operations, key=own, reverse=True)[:_OPERATIONS]
        ]
        header = ("phase, or operation by itself", "calls", "ms", "% of the time")
        return table(header, rows)


def _cells(microseconds: float, seconds: float) -> tuple[str, str]:
    return f"{microseconds / 1e3:.1f}", f"{microseconds / 1e4 / seconds:.1f}"
