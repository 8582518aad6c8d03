"""Images per second of the trainer's loop relative to a bare loop.

The trainer runs whole epochs on images that live on the device: order, crops and flips,
normalization, metrics, schedule, callbacks. After each of them, a bare loop takes as many steps,
forward, backward and optimizer, on one batch in memory. Both use the same network, memory format,
precision and threads.

    python benchmarks/train.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from reporting import machine, ratios, spread, verdict

from dist_graft import Callback, Trainer
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.printing import format_table
from dist_graft.training.builders import build_state

TARGET = 0.95
DATA = {"fashion-mini": "fashion-mini", "random": "train:random_images"}
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


def random_images(root: str) -> tuple[Images, Images]:
    """Noise in the format of CIFAR, as `data.name` expects it: 5,000 and 1,000 images."""
    generator = np.random.default_rng(0)
    train, test = (
        (
            generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8),
            generator.integers(0, 10, count),
        )
        for count in (5000, 1000)
    )
    return train, test


class BareLoop(Callback):
    """Times each epoch's steps, and as many steps of a bare loop after them."""

    def __init__(self) -> None:
        self.trainer_speeds: list[float] = []
        """Images per second, by epoch."""
        self.bare_speeds: list[float] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self._bare = build_state(trainer.config, trainer.data, trainer.runtime, lr=trainer.max_lr)
        self._batch = next(trainer.data.train_batches(0, 0, 1))

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._start = time.perf_counter()

    def on_evaluate_start(self, trainer: Trainer) -> None:
        images = trainer.steps_per_epoch * trainer.config.data.batch_size
        self.trainer_speeds.append(images / (time.perf_counter() - self._start))
        trained = trainer.progress.trained
        assert trained is not None
        assert trained.samples == images
        self.bare_speeds.append(images / self._seconds(trainer.steps_per_epoch))

    def _seconds(self, steps: int) -> float:
        forward, optimizer = self._bare.forward, self._bare.optimizer
        inputs, labels = self._batch
        self._bare.model.train()
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            with self._bare.autocast():
                loss = F.cross_entropy(forward(inputs), labels)
            loss.backward()
            optimizer.step()
        if inputs.device.type != "cpu":
            torch.accelerator.synchronize(inputs.device)
        return time.perf_counter() - start


def compare(precision: str, options: argparse.Namespace, run_dir: str) -> BareLoop:
    """Run both loops, including one warm-up epoch of each."""
    config = TrainConfig(
        run_dir=run_dir,
        epochs=options.repetitions + 1,
        data=DataConfig(
            name=DATA[options.data],
            batch_size=options.batch_size,
            train_samples=options.steps * options.batch_size,
            test_samples=options.batch_size,
            image_size=32,
            channels=3,
        ),
        model=ModelConfig(name=options.model),
        runtime=RuntimeConfig(device="cpu", precision=precision, threads=options.threads),
        checkpoint=CheckpointConfig(every=0),
        monitor=MonitorConfig(tensorboard=False, progress="lines"),
    )
    loops = BareLoop()
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config, callbacks=[loops]).fit()
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", choices=tuple(DATA), default="fashion-mini")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="*")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16, help="per epoch, at most 39")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    print(machine())
    print(
        f"{options.model}, 3 x 32 x 32, {options.data}, batch {options.batch_size}, "
        f"{options.steps} steps per epoch, channels_last, {options.threads} threads; "
        f"n = {options.repetitions} epochs of each, interleaved, after one warm-up of each"
    )
    results: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precision or ("fp32", "bf16"):
            loops = compare(precision, options, f"{folder}/{precision}")
            results[precision] = loops.trainer_speeds[1:], loops.bare_speeds[1:]
    rows = [(name, *(spread(speeds, 0) for speeds in both)) for name, both in results.items()]
    print(format_table(("", "trainer, images/s", "bare loop, images/s"), rows))
    for precision, (trainer, bare) in results.items():
        relative = ratios(trainer, bare)
        print(verdict(f"trainer / bare loop, {precision}", relative, at_least=TARGET))


if __name__ == "__main__":
    main()
