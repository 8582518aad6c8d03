"""Cost of monitoring (TensorBoard, metrics.jsonl, log, figures) relative to an epoch.

A trainer with one thread trains a ResNet-20 with all built-in callbacks. It is alone, but receives
the reports and rounds of a population of two as its first network, which also writes the
population's files and therefore has the most to write.

    python benchmarks/monitor.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from reporting import machine, ratios, spread, verdict

from dist_graft import Callback, Graft, Trainer
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.errors import StoppedEarlyError
from dist_graft.grafting.units import graft_tensors
from dist_graft.monitoring.layer_history import Pacing
from dist_graft.monitoring.metrics import EpochReport
from dist_graft.population.round.record import GraftRecord
from dist_graft.printing import format_table
from dist_graft.training.builders import built_in_callbacks
from dist_graft.training.callbacks import CallbackList
from dist_graft.training.layer_stats import layer_stats
from dist_graft.training.schedule import Segment
from dist_graft.training.step import EvalResult

MAX_SHARE = 0.01
LONG_RUN = 200  # epochs


@dataclass
class Timings:
    """Seconds of each epoch."""

    epoch: list[float] = field(default_factory=list)
    """Training and evaluation, without callbacks."""
    layers: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    """All callbacks of the epoch."""


class TimedCallbacks(CallbackList):
    """Adds up the seconds of all hooks, and reports a population of two."""

    seconds = 0.0

    def call(self, hook: str, trainer: Trainer, *arguments: object) -> None:
        arguments = tuple(
            replace(argument, networks=[*argument.networks] * 2)
            if isinstance(argument, EpochReport)
            else argument
            for argument in arguments
        )
        start = time.perf_counter()
        super().call(hook, trainer, *arguments)
        self.seconds += time.perf_counter() - start


class TimedTrainer(Trainer):
    """Times each epoch and its callbacks; has the record of a round after every epoch.

    Args:
        config: of the run.
        last_epoch: 0-based; the run stops after it.
    """

    def __init__(self, config: TrainConfig, last_epoch: int) -> None:
        super().__init__(config, callbacks=[StopAfter(last_epoch)])
        self.timings = Timings()
        self._work = 0.0

    def train_epoch(self, epoch: int) -> None:
        self.callbacks.seconds, self._work = 0.0, 0.0
        super().train_epoch(epoch)
        self.timings.epoch.append(self._work)
        self.timings.files.append(self.callbacks.seconds)

    def train_segment(self, segment: Segment, batches: Iterator[tuple[Any, Any]]) -> None:
        with self._working():
            super().train_segment(segment, batches)

    def evaluate(self, *, last: bool = False) -> dict[str, EvalResult]:
        with self._working():
            results = super().evaluate(last=last)
        start = time.perf_counter()
        layer_stats(self.config, self.state, self.units)
        self.timings.layers.append(time.perf_counter() - start)
        return results

    def graft_round(self, segment: Segment) -> None:
        super().graft_round(segment)
        record = self._record()
        self.progress.add_round(record)
        self.callbacks.call("on_round_end", self, record)

    def _open_run(self) -> None:
        super()._open_run()
        self.run_events, built_in = built_in_callbacks(self.config, self.process)
        self.callbacks: TimedCallbacks = TimedCallbacks(built_in, self._user_callbacks)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Count the time of the block, except for its callbacks."""
        start, before = time.perf_counter(), self.callbacks.seconds
        yield
        self._work += time.perf_counter() - start - (self.callbacks.seconds - before)

    def _record(self) -> GraftRecord:
        """What a round with a second network would record."""
        names = [unit.name for unit in self.units]
        information = Graft().measure(self.units, graft_tensors(self.model))
        mixing = Graft().decide(torch.stack([information, information + 0.1]), self.round)
        return GraftRecord(
            round=self.round,
            network=0,
            donor=1,
            coefficient=dict(zip(names, mixing.own_share(0), strict=True)),
            information=dict(zip(names, information.tolist(), strict=True)),
            distance=dict.fromkeys(names, 1.0),
            seconds=0.1,
            phase_seconds={"agree": 0.1},
            bytes_received=1,
            diverged={},
            mixing=mixing,
            healed={},
        )


class StopAfter(Callback):
    """Stops the run after an epoch (0-based)."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def on_epoch_start(self, trainer: Trainer) -> None:
        if trainer.epoch > self._epoch:
            raise StoppedEarlyError("enough epochs are measured")


def measure(config: TrainConfig, *, epochs: int) -> Timings:
    """Timings of the first epochs of a run."""
    trainer = TimedTrainer(config, last_epoch=epochs - 1)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(StoppedEarlyError),
    ):
        trainer.fit()
    return trainer.timings


def share_of_a_long_run(epoch: float, report: float, figures: float) -> float:
    """Share of monitoring in a long run, given the seconds of an epoch, a report, and figures."""
    now = 0.0
    pacing = Pacing(LONG_RUN, lambda: now)
    spent = 0.0
    for number in range(LONG_RUN):
        now += epoch + report
        spent += report
        if pacing.due(number):
            with pacing.drawing():
                now += figures
            spent += figures
    return spent / (LONG_RUN * epoch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="per epoch, at most 5000")
    parser.add_argument("--epochs", type=int, default=5, help="1 to 5")
    options = parser.parse_args()
    if not 1 <= options.epochs <= 5:
        parser.error("--epochs must be from 1 to 5")
    print(machine())
    print(
        f"ResNet-20, 1 x 28 x 28, batch 128, {options.images} images per epoch, a fifth as many "
        f"test images; n = {options.epochs} epochs, after one warm-up"
    )
    config = TrainConfig(
        epochs=LONG_RUN,
        data=DataConfig(train_samples=options.images, test_samples=options.images // 5),
        model=ModelConfig(name="resnet20"),
        runtime=RuntimeConfig(device="cpu", threads=1),
        checkpoint=CheckpointConfig(every=0),
        monitor=MonitorConfig(progress="lines"),
    )
    # A run's last epoch always has figures; what they cost does not depend on the images.
    short = replace(config, epochs=1, data=DataConfig(train_samples=128, test_samples=128))
    with tempfile.TemporaryDirectory() as folder:
        runs = [str(Path(folder) / f"run{number}") for number in range(options.epochs + 2)]
        timings = measure(replace(config, run_dir=runs[0]), epochs=options.epochs + 1)
        drawn = [measure(replace(short, run_dir=run), epochs=1).files[0] for run in runs[1:]]
    epoch, layers, files, figures = (
        values[1:] for values in (timings.epoch, timings.layers, timings.files, drawn)
    )
    rows = [
        ("epoch", epoch),
        ("information of layers", layers),
        ("files", files),
        ("files, with figures", figures),
    ]
    print(format_table(("", "seconds"), [(name, spread(values, 4)) for name, values in rows]))
    reports = [one + other for one, other in zip(layers, files, strict=True)]
    print(verdict("reporting / epoch", ratios(reports, epoch), at_most=MAX_SHARE))
    drawing = statistics.median(figures)
    shares = [
        share_of_a_long_run(seconds, report, drawing)
        for seconds, report in zip(epoch, reports, strict=True)
    ]
    name = f"reporting with figures / {LONG_RUN} such epochs"
    print(verdict(name, shares, at_most=MAX_SHARE))


if __name__ == "__main__":
    main()
