"""What PAPA in parallel processes costs, against networks that exchange nothing.

Two gloo processes with one thread each train a ResNet-20 as the trainer does: in turn an epoch on
its own, and an epoch with a pull to the mean after every 10 steps. A process that is ahead waits
for its peer before a pull; that is the machine's doing, is measured by a barrier and told apart.

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
from dist_graft.training.loop import train_steps
from reporting import machine, ratios, spread, table, verdict

from dist_graft import Grafter, Papa
from dist_graft.config import DataConfig, ModelConfig, RuntimeConfig, TrainConfig
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.builders import build_train_state
from dist_graft.training.data import load_data

DEVICE = torch.device("cpu")
MOST_OF_THE_TIME, LEAST_IMAGES = 0.01, 0.95


@dataclass
class Seen:
    """Seconds of each repetition, in one process."""

    alone: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    exchange: list[float] = field(default_factory=list)


def watch(rank: int, options: argparse.Namespace, folder: str) -> Seen:
    """Train both ways in one of the processes; all of them must run this."""
    keep_freed_memory()  # as a run does
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
    independent, pulled = (build_train_state(config, data, runtime) for _ in range(2))
    grafter = Grafter(pulled.model, rule=Papa(), exchange=options.exchange)
    seen = Seen()
    for epoch in range(options.repetitions + 1):
        if epoch == 1:
            seen = Seen()
        dist.barrier()
        clock = time.perf_counter()
        for first in range(0, steps, every):
            train_steps(
                independent, data, config.optim, epoch=epoch, first=first, last=first + every
            )
        seen.alone.append(time.perf_counter() - clock)
        dist.barrier()
        parts = [0.0, 0.0, 0.0]
        clock = time.perf_counter()
        for first in range(0, steps, every):
            train_steps(pulled, data, config.optim, epoch=epoch, first=first, last=first + every)
            for part, act in enumerate((lambda: None, dist.barrier, grafter.graft)):
                act()
                now = time.perf_counter()
                parts[part] += now - clock
                clock = now
        for seconds, part in zip((seen.steps, seen.waiting, seen.exchange), parts, strict=True):
            seconds.append(part)
    dist.barrier()
    dist.destroy_process_group()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--exchange", choices=("all_gather", "p2p"), default="all_gather")
    parser.add_argument("--every_steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch, up to 39")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    if options.steps % options.every_steps:
        parser.error("--steps must be a multiple of --every_steps")

    print(machine())
    print(
        f"ResNet-20, 3 x 32 x 32, batch 128, {options.precision}, {options.networks} gloo "
        f"processes with 1 thread; a pull every {options.every_steps} of {options.steps} steps; "
        f"n = {options.repetitions} epochs of each in turn, after one of each unseen; seconds"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.networks, mp_context=get_context("spawn")) as pool,
    ):
        ranks = range(options.networks)
        everyone = list(pool.map(watch, ranks, [options] * len(ranks), [folder] * len(ranks)))
    names = ("alone", "steps", "waiting", "exchange")
    print(
        table(
            ("", "independent", "steps", "waiting", "exchange"),
            [
                (f"network {rank}", *(spread(getattr(seen, name), 3) for name in names))
                for rank, seen in enumerate(everyone)
            ],
        )
    )
    share, speed, with_waiting = [], [], []
    for seen in everyone:
        busy = [s + e for s, e in zip(seen.steps, seen.exchange, strict=True)]
        whole = [b + w for b, w in zip(busy, seen.waiting, strict=True)]
        share += ratios(seen.exchange, whole)
        speed += ratios(seen.alone, busy)
        with_waiting += ratios(seen.alone, whole)
    print(verdict("share of the time that is exchange", share, at_most=MOST_OF_THE_TIME))
    print(verdict("images/s over independent networks", speed, at_least=LEAST_IMAGES))
    print(f"the same, with waiting for a slower peer: {spread(with_waiting, 3)}")


if __name__ == "__main__":
    main()
