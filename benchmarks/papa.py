"""Cost of PAPA in parallel processes, relative to independent networks.

Two gloo processes with one thread each train a ResNet-20 as the trainer does, alternating between
an independent epoch and an epoch with a pull to the mean every 10 steps. A process that is ahead
waits for its peer before a pull. This depends on the machine, not on PAPA, so a barrier measures it
separately.

    python benchmarks/papa.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
from reporting import machine, ratios, spread, verdict

from dist_graft import Grafter, Papa
from dist_graft.config import DataConfig, ModelConfig, RuntimeConfig, TrainConfig
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.printing import format_table
from dist_graft.training.builders import build_state
from dist_graft.training.data import ImageData, load_data
from dist_graft.training.state import TrainState
from dist_graft.training.step import RunningSums, train_step
from dist_graft.training.task import classification

DEVICE = torch.device("cpu")
MAX_EXCHANGE_SHARE, MIN_THROUGHPUT = 0.01, 0.95


@dataclass
class Timings:
    """Seconds of each repetition, in one process."""

    independent: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    exchange: list[float] = field(default_factory=list)


def train_steps(
    state: TrainState, data: ImageData, config: TrainConfig, epoch: int, first: int, last: int
) -> None:
    """Take some steps of an epoch, as the trainer does between two rounds."""
    task = classification()
    sums = RunningSums(task, DEVICE)
    state.model.train()
    for step, (inputs, targets) in enumerate(data.train_batches(epoch, first, last), start=first):
        part = data.part(step)
        train_step(state, task, inputs, targets, config=config.optim, part=part, sums=sums)
        state.scheduler.step()
    sums.result(steps=last - first, seconds=0.0, data_seconds=0.0)


def measure(rank: int, options: argparse.Namespace, folder: str) -> Timings:
    """Train both ways in one of the processes; every rank must call this."""
    keep_freed_memory()  # as a training run does
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", options.networks),
        rank=rank,
        world_size=options.networks,
        timeout=timedelta(seconds=300),
    )
    every, steps = options.every_steps, options.steps
    config = TrainConfig(
        epochs=options.repetitions + 1,
        data=DataConfig(train_samples=steps * 128, image_size=32, channels=3),
        model=ModelConfig(name="resnet20"),
        runtime=RuntimeConfig(precision=options.precision, threads=1),
    )
    data = load_data(config.data, seed=0, network=rank, device=DEVICE, channels_last=True)
    runtime = Runtime(
        ProcessInfo(rank, options.networks), DEVICE, "gloo", Timeouts(300, epochs=5), None
    )
    lr = config.optim.lr
    independent, papa = (build_state(config, data, runtime, lr=lr) for _ in range(2))
    grafter = Grafter(papa.model, rule=Papa(), exchange=options.exchange)
    timings = Timings()
    for epoch in range(options.repetitions + 1):
        if epoch == 1:
            timings = Timings()  # without the warm-up
        dist.barrier()
        clock = time.perf_counter()
        for first in range(0, steps, every):
            train_steps(independent, data, config, epoch, first, first + every)
        timings.independent.append(time.perf_counter() - clock)
        dist.barrier()
        steps_seconds = waiting = exchange = 0.0
        clock = time.perf_counter()
        for first in range(0, steps, every):
            train_steps(papa, data, config, epoch, first, first + every)
            trained = time.perf_counter()
            dist.barrier()
            met = time.perf_counter()
            grafter.graft()
            end = time.perf_counter()
            steps_seconds += trained - clock
            waiting += met - trained
            exchange += end - met
            clock = end
        timings.steps.append(steps_seconds)
        timings.waiting.append(waiting)
        timings.exchange.append(exchange)
    dist.barrier()
    dist.destroy_process_group()
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--exchange", choices=("all_gather", "p2p"), default="all_gather")
    parser.add_argument("--every_steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="per epoch, at most 39")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    if options.steps % options.every_steps:
        parser.error("--steps must be a multiple of --every_steps")

    print(machine())
    print(
        f"ResNet-20, 3 x 32 x 32, batch 128, {options.precision}, {options.networks} gloo "
        f"processes with 1 thread; a pull every {options.every_steps} of {options.steps} steps; "
        f"n = {options.repetitions} epochs of each, interleaved, after one warm-up of each; "
        "seconds"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.networks, mp_context=get_context("spawn")) as pool,
    ):
        ranks = range(options.networks)
        by_rank = list(pool.map(measure, ranks, [options] * len(ranks), [folder] * len(ranks)))
    names = ("independent", "steps", "waiting", "exchange")
    print(
        format_table(
            ("", *names),
            [
                (f"network {rank}", *(spread(getattr(timings, name), 3) for name in names))
                for rank, timings in enumerate(by_rank)
            ],
        )
    )
    share, throughput, with_waiting = [], [], []
    for timings in by_rank:
        busy = [s + e for s, e in zip(timings.steps, timings.exchange, strict=True)]
        total = [b + w for b, w in zip(busy, timings.waiting, strict=True)]
        share += ratios(timings.exchange, total)
        throughput += ratios(timings.independent, busy)
        with_waiting += ratios(timings.independent, total)
    print(verdict("exchange / total time", share, at_most=MAX_EXCHANGE_SHARE))
    print(verdict("images/s / independent networks", throughput, at_least=MIN_THROUGHPUT))
    print(f"images/s including waits / independent networks: {spread(with_waiting, 3)}")


if __name__ == "__main__":
    main()
