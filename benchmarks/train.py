"""Images per second of the trainer's loop relative to a bare loop.

The trainer's loop (`train_steps` on images that live on the device: order, crops and flips,
normalization, metrics, schedule) runs a whole epoch. The bare loop runs forward, backward, and
optimizer step on one batch in memory. Both use the same network, memory format, precision, and
threads, interleaved in one process.

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
class Throughput:
    """Images per second of each repetition."""

    trainer: list[float]
    bare: list[float]


def random_images(count: int) -> ImageSet:
    """Draw noise in the format of CIFAR: uint8 [count, 3, 32, 32], ten classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return ImageSet(images, generator.integers(0, 10, count))


def load(name: str, config: TrainConfig) -> Data:
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


def bare_loop(state: TrainState, data: Data, steps: int) -> float:
    """Take `steps` steps on the first batch of an epoch; returns their seconds."""
    model, optimizer = state.model, state.optimizer
    inputs, labels = next(data.train_batches(0, 0, 1))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=state.precision == "bf16")
    model.train()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def compare(precision: str, options: argparse.Namespace) -> Throughput:
    """Interleave epochs of the trainer with as many bare steps, after one warm-up of each."""
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
    data = load(options.data, config)
    runtime = Runtime(ProcessInfo(), DEVICE, "none", Timeouts(60, epochs=5), None)
    state, bare_state = (build_train_state(config, data, runtime) for _ in range(2))
    images = data.steps_per_epoch * options.batch_size
    throughput = Throughput([], [])
    for epoch in range(options.repetitions + 1):
        start = time.perf_counter()
        trained = train_steps(
            state, data, config.optim, epoch=epoch, first=0, last=data.steps_per_epoch
        )
        seconds = time.perf_counter() - start
        assert trained.images == images
        bare_seconds = bare_loop(bare_state, data, data.steps_per_epoch)
        if epoch:
            throughput.trainer.append(images / seconds)
            throughput.bare.append(images / bare_seconds)
    return throughput


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", choices=("fashion-mini", "random"), default="fashion-mini")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="*")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16, help="per epoch, at most 39")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()  # as a training run on the CPU does; for both loops
    torch.set_num_threads(options.threads)

    print(machine())
    print(
        f"{options.model}, 3 x 32 x 32, {options.data}, batch {options.batch_size}, "
        f"{options.steps} steps per epoch, channels_last, {options.threads} threads; "
        f"n = {options.repetitions} epochs of each, interleaved, after one warm-up of each"
    )
    results = {kind: compare(kind, options) for kind in options.precision or ("fp32", "bf16")}
    rows = [
        (precision, spread(throughput.trainer, 0), spread(throughput.bare, 0))
        for precision, throughput in results.items()
    ]
    print(table(("", "trainer, images/s", "bare loop, images/s"), rows))
    for precision, throughput in results.items():
        relative = ratios(throughput.trainer, throughput.bare)
        print(verdict(f"trainer / bare loop, {precision}", relative, at_least=TARGET))


if __name__ == "__main__":
    main()
