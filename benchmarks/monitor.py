"""Cost of monitoring (TensorBoard, metrics.jsonl, log, figures) relative to an epoch.

The first of two networks, a ResNet-20 with one thread, is trained, evaluated, and reported by the
trainer's own functions. The ratios are those of this process, which also writes the population's
files and therefore has the most to write.

python benchmarks/monitor.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from dist_graft.training.loop import evaluate, train_steps
from dist_graft.training.reporting import Reporter, epoch_metrics, row_of, with_round
from reporting import machine, ratios, spread, table, verdict

from dist_graft import Graft, graft_units
from dist_graft.config import DataConfig, ModelConfig, RuntimeConfig, TrainConfig
from dist_graft.grafting.units import graft_tensors
from dist_graft.monitoring.layer_history import Pacing
from dist_graft.monitoring.log import close_log, open_log
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.run_directory import RunDirectory
from dist_graft.training.builders import build_train_state
from dist_graft.training.data import load_data
from dist_graft.training.layer_stats import layer_stats
from dist_graft.training.schedule import Position

DEVICE = torch.device("cpu")
PROCESS = ProcessInfo(0, 2, 0, 2)
MAX_SHARE = 0.01
LONG_RUN = 200  # epochs


@dataclass
class Timings:
    """Seconds of each epoch, and of each report with figures."""

    epoch: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)


def open_reporter(config: TrainConfig, folder: Path) -> Reporter:
    """Open the reporter of the first of two processes."""
    directory = RunDirectory(str(folder))
    log = open_log(directory.network(0), directory.population, console=False)
    directory.describe(config, PROCESS.networks)
    return Reporter(config, directory, PROCESS, start=Position(), hosts=["a", "b"], log=log)


def measure(options: argparse.Namespace, folder: Path) -> Timings:
    """Train and report, first without figures, then with them."""
    config = TrainConfig(
        epochs=LONG_RUN,
        data=DataConfig(train_samples=options.images, test_samples=options.images // 5),
        model=ModelConfig(name="resnet20"),
        runtime=RuntimeConfig(threads=1),
    )
    runtime = Runtime(PROCESS, DEVICE, "gloo", Timeouts(300, epochs=5), None)
    data = load_data(config.data, seed=0, network=0, device=DEVICE, channels_last=True)
    state = build_train_state(config, data, runtime)
    units = graft_units(state.model)
    names = [unit.name for unit in units]

    def report(reporter: Reporter, epoch: int) -> float:
        reporter.round(epoch, record)
        rounds = with_round(None, record)
        metrics = epoch_metrics(
            epoch, 0.1, trained, tested, None, rounds, layers, {"step": 1.0, "round": 0.1}
        )
        start = time.perf_counter()
        reporter.network(metrics, layers)
        row = row_of(metrics, busy=1.0, whole=1.0, sound=True)
        reporter.population(epoch, epoch + 1, trained.seconds, [row, row], tested.accuracy)
        return time.perf_counter() - start

    timings = Timings()
    reporter = open_reporter(config, folder / "no_figures")
    for epoch in range(options.epochs + 1):
        start = time.perf_counter()
        trained = train_steps(
            state, data, config.optim, epoch=epoch, first=0, last=data.steps_per_epoch
        )
        tested = evaluate(state, data, "test")
        timings.epoch.append(time.perf_counter() - start)
        start = time.perf_counter()
        layers = layer_stats(config, state, units)
        timings.layers.append(time.perf_counter() - start)
        information = Graft().measure(units, graft_tensors(state.model))
        mixing = Graft().decide(torch.stack([information, information + 0.1]), epoch)
        record = GraftRecord(
            round=epoch,
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
        timings.files.append(report(reporter, epoch))
    reporter.close()
    for number in range(options.epochs + 1):  # a run's last epoch always has figures
        reporter = open_reporter(replace(config, epochs=1), folder / f"figures{number}")
        timings.figures.append(report(reporter, 0))
        reporter.close()
    close_log()
    return timings


def share_of_a_long_run(epoch: float, report: float, figures: float) -> float:
    """Share of reporting in a long run, given the seconds of an epoch, a report, and figures."""
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
    keep_freed_memory()  # as a training run does
    torch.set_num_threads(1)
    print(machine())
    print(
        f"ResNet-20, 1 x 28 x 28, batch 128, {options.images} images per epoch, a fifth as many "
        f"test images; n = {options.epochs} epochs, after one warm-up"
    )
    with tempfile.TemporaryDirectory() as folder:
        timings = measure(options, Path(folder))
    epoch, layers, files, figures = (
        values[1:] for values in (timings.epoch, timings.layers, timings.files, timings.figures)
    )
    rows = [
        ("epoch", epoch),
        ("information of layers", layers),
        ("files", files),
        ("files, with figures", figures),
    ]
    print(table(("", "seconds"), [(name, spread(values, 4)) for name, values in rows]))
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
