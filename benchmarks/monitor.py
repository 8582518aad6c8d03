"""What watching a run costs: TensorBoard, metrics.jsonl, log and pictures, against the epoch.

The first of two networks, a ResNet-20 with one thread, is trained and tested by the trainer's own
functions, and reported as the trainer does it, for all networks. The ratios are of one process: the
other one, without a population's board, has less to write.

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
PLACE = ProcessInfo(0, 2, 0, 2)
MOST_OF_THE_EPOCH = 0.01
LONG_RUN = 200


@dataclass
class Seen:
    """Seconds of each epoch, and of each time that pictures are drawn."""

    epoch: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)


def open_reporter(config: TrainConfig, folder: Path) -> Reporter:
    """As the first process of two opens it."""
    directory = RunDirectory(str(folder))
    log = open_log(directory.network(0), directory.population, console=False)
    directory.describe(config, PLACE.networks)
    return Reporter(config, directory, PLACE, start=Position(), hosts=["a", "b"], log=log)


def watch(options: argparse.Namespace, folder: Path) -> Seen:
    """Train and report, first without pictures, then with them."""
    config = TrainConfig(
        epochs=LONG_RUN,
        data=DataConfig(train_samples=options.images, test_samples=options.images // 5),
        model=ModelConfig(name="resnet20"),
        runtime=RuntimeConfig(threads=1),
    )
    runtime = Runtime(PLACE, DEVICE, "gloo", Timeouts(300, epochs=5), None)
    data = load_data(config.data, seed=0, network=0, device=DEVICE, channels_last=True)
    trainee = build_train_state(config, data, runtime)
    units = graft_units(trainee.model)
    names = [unit.name for unit in units]

    def report(reporter: Reporter, epoch: int) -> float:
        reporter.round(epoch, record)
        rounds = with_round(None, record)
        metrics = epoch_metrics(
            epoch, 0.1, trained, tested, None, rounds, layers, {"step": 1.0, "round": 0.1}
        )
        clock = time.perf_counter()
        reporter.network(metrics, layers)
        row = row_of(metrics, busy=1.0, whole=1.0, sound=True)
        reporter.population(epoch, epoch + 1, trained.seconds, [row, row], tested.accuracy)
        return time.perf_counter() - clock

    seen = Seen()
    reporter = open_reporter(config, folder / "usual")
    for epoch in range(options.epochs + 1):
        clock = time.perf_counter()
        trained = train_steps(
            trainee, data, config.optim, epoch=epoch, first=0, last=data.steps_per_epoch
        )
        tested = evaluate(trainee, data, "test")
        seen.epoch.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        layers = layer_stats(config, trainee, units)
        seen.layers.append(time.perf_counter() - clock)
        own = Graft().measure(units, graft_tensors(trainee.model))
        mixing = Graft().decide(torch.stack([own, own + 0.1]), epoch)
        record = GraftRecord(
            round=epoch,
            network=0,
            donor=1,
            coefficient=dict(zip(names, mixing.own_share(0), strict=True)),
            information=dict(zip(names, own.tolist(), strict=True)),
            distance=dict.fromkeys(names, 1.0),
            seconds=0.1,
            phase_seconds={"agree": 0.1},
            bytes_received=1,
            diverged={},
            mixing=mixing,
            healed={},
        )
        seen.files.append(report(reporter, epoch))
    reporter.close()
    for times in range(options.epochs + 1):  # the last epoch of a run is always drawn
        reporter = open_reporter(replace(config, epochs=1), folder / f"drawn{times}")
        seen.pictures.append(report(reporter, 0))
        reporter.close()
    close_log()
    return seen


def share_of_a_long_run(epoch: float, logged: float, drawn: float) -> float:
    """Of reporting, over many epochs that take so many seconds each, pictures included."""
    now = 0.0
    pacing = Pacing(LONG_RUN, lambda: now)
    spent = 0.0
    for number in range(LONG_RUN):
        now += epoch + logged
        spent += logged
        if pacing.due(number):
            with pacing.drawing():
                now += drawn
            spent += drawn
    return spent / (LONG_RUN * epoch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="of an epoch, at most 5000")
    parser.add_argument("--epochs", type=int, default=5, help="1 to 5")
    options = parser.parse_args()
    if not 1 <= options.epochs <= 5:
        parser.error("--epochs must be from 1 to 5")
    keep_freed_memory()  # as a run does
    torch.set_num_threads(1)
    print(machine())
    print(
        f"ResNet-20, 1 x 28 x 28, batch 128, {options.images} images an epoch, tested on a fifth; "
        f"n = {options.epochs} epochs, after one unseen"
    )
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(options, Path(folder))
    epoch, layers, files, pictures = (
        values[1:] for values in (seen.epoch, seen.layers, seen.files, seen.pictures)
    )
    rows = [
        ("epoch", epoch),
        ("layers' information", layers),
        ("files", files),
        ("files, with pictures", pictures),
    ]
    print(table(("", "seconds"), [(name, spread(values, 4)) for name, values in rows]))
    both = [one + other for one, other in zip(layers, files, strict=True)]
    print(verdict("share of an epoch", ratios(both, epoch), at_most=MOST_OF_THE_EPOCH))
    drawn = statistics.median(pictures)
    shares = [
        share_of_a_long_run(one, logged, drawn) for one, logged in zip(epoch, both, strict=True)
    ]
    name = f"share of {LONG_RUN} such epochs, pictures included"
    print(verdict(name, shares, at_most=MOST_OF_THE_EPOCH))


if __name__ == "__main__":
    main()
