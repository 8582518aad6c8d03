"""Training as the trainer runs it, against a bare loop: images per second.

The trainer's loop (`train_steps` on images that live on the device: order, crops and flips,
normalisation, metrics, schedule) walks through a whole epoch; the bare loop runs forward,
backward and optimizer step on one batch that it has already. Same network, memory format,
precision and threads, in one process, in turn.

    python benchmarks/train.py
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from dist_graft.training.loop import TrainState, train_steps
from reporting import machine, ratios, spread, table, verdict

from dist_graft.config import DataConfig, ModelConfig, RuntimeConfig, TrainConfig
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.builders import build_train_state
from dist_graft.training.data import Data, load_data
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.sources import DatasetInfo, ImageSet

TARGET = 0.95
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Sides:
    """Images per second of each repetition."""

    trainer: list[float]
    bare: list[float]


def random_images(count: int) -> ImageSet:
    """Noise in the form of CIFAR: uint8 [count, 3, 32, 32] in ten classes."""
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return ImageSet(images, draws.integers(0, 10, count))


def open_data(name: str, config: TrainConfig) -> Data:
    if name == "fashion-mini":
        return load_data(config.data, seed=0, network=0, device=DEVICE, channels_last=True)
    facts = DatasetInfo(num_classes=10, mean=(0.5,) * 3, std=(0.29,) * 3)
    assert config.data.train_samples
    return ResidentImages(
        random_images(config.data.train_samples),
        random_images(config.data.batch_size),
        facts,
        config.data,
        seed=0,
        network=0,
        device=DEVICE,
        channels_last=True,
    )


def bare_loop(trainee: TrainState, data: Data, steps: int) -> float:
    """Seconds of `steps` steps on the first batch of an epoch."""
    model, optimizer = trainee.model, trainee.optimizer
    inputs, labels = next(data.train_batches(0, 0, 1))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=trainee.precision == "bf16")
    model.train()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def compare(precision: str, options: argparse.Namespace) -> Sides:
    """Time an epoch of the trainer and as many bare steps, in turn, after one of each unseen."""
    config = TrainConfig(
        epochs=options.repetitions + 1,
        data=DataConfig(
            batch_size=options.batch_size,
            train_samples=options.steps * options.batch_size,
            image_size=32,
            channels=3,
        ),
        model=ModelConfig(name=options.model),
        runtime=RuntimeConfig(precision=precision, threads=options.threads),
    )
    data = open_data(options.data, config)
    alone = Runtime(ProcessInfo(), DEVICE, "none", Timeouts(60, epochs=5), None)
    ours, bare = build_train_state(config, data, alone), build_train_state(config, data, alone)
    images = data.steps_per_epoch * options.batch_size
    sides = Sides([], [])
    for epoch in range(options.repetitions + 1):
        start = time.perf_counter()
        trained = train_steps(
            ours, data, config.optim, epoch=epoch, first=0, last=data.steps_per_epoch
        )
        seconds = time.perf_counter() - start
        assert trained.images == images
        bare_seconds = bare_loop(bare, data, data.steps_per_epoch)
        if epoch:
            sides.trainer.append(images / seconds)
            sides.bare.append(images / bare_seconds)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", choices=("fashion-mini", "random"), default="fashion-mini")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="*")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16, help="of an epoch (at most 39)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()  # as a run on the CPU does, for both loops
    torch.set_num_threads(options.threads)

    print(machine())
    print(
        f"{options.model}, 3 x 32 x 32, {options.data}, batch {options.batch_size}, "
        f"{options.steps} steps an epoch, channels_last, {options.threads} threads; "
        f"n = {options.repetitions} epochs of each in turn, after one of each unseen"
    )
    results = {kind: compare(kind, options) for kind in options.precision or ("fp32", "bf16")}
    rows = [
        (precision, spread(sides.trainer, 0), spread(sides.bare, 0))
        for precision, sides in results.items()
    ]
    print(table(("", "trainer, images/s", "bare loop, images/s"), rows))
    for precision, sides in results.items():
        share = ratios(sides.trainer, sides.bare)
        print(verdict(f"ratio train {precision}", share, at_least=TARGET))


if __name__ == "__main__":
    main()
