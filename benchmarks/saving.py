"""Checkpoint stall relative to a plain copy of the same state to host memory.

One process saves the state of a ResNet-50 and its SGD momentum (51 million numbers) in the
background, as the trainer does, and trains a ResNet-20 while the file is written. Each repetition
times a plain copy of the same tensors, a checkpoint, training steps during the write, and training
steps without one.

python benchmarks/saving.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reporting import machine, ratios, spread, verdict
from torch import nn

from dist_graft.config import ModelConfig
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.printing import format_table
from dist_graft.training.checkpoint.writer import CheckpointWriter
from dist_graft.training.models import build_model
from dist_graft.training.schedule import Position

STALL_TARGET = 1.2
STEPS_ALONE = 10


@dataclass
class Timings:
    """Seconds of each repetition."""

    copy: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    step_during: list[float] = field(default_factory=list)
    longest_during: list[float] = field(default_factory=list)
    step_alone: list[float] = field(default_factory=list)


TITLES = {
    "copy": "copy to host memory",
    "stall": "checkpoint stall",
    "write": "until the checkpoint is complete",
    "step_during": "step during the write",
    "longest_during": "longest step during the write",
    "step_alone": "step alone",
}


def trained(name: str, images: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model and take one step, so that its optimizer has momentum."""
    model = build_model(ModelConfig(name=name), num_classes=10, channels=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, images)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """Take a training step; returns its seconds."""
    start = time.perf_counter()
    loss = nn.functional.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measure(model_name: str, repetitions: int) -> tuple[Timings, int]:
    """Time checkpoints of a model; returns the timings and the bytes of its state."""
    model, optimizer = trained(model_name, torch.randn(2, 3, 64, 64))
    batch = torch.randn(32, 3, 32, 32)
    small_model, small_optimizer = trained("resnet20", batch)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tensors = [
        *model.state_dict().values(),
        *(entry["momentum_buffer"] for entry in optimizer.state.values()),
    ]
    timings = Timings()
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(0, None, seconds=lambda: 600.0, keep=2)
        for number in range(repetitions + 1):
            if number == 1:
                timings = Timings()  # without the warm-up
            start = time.perf_counter()
            copied = [tensor.to("cpu", copy=True) for tensor in tensors]
            timings.copy.append(time.perf_counter() - start)
            del copied

            path = Path(folder) / f"epoch_{number + 1:04d}"
            start = time.perf_counter()
            writer.start(f"checkpoint {number}", path, Position(number + 1), state)
            timings.stall.append(time.perf_counter() - start)
            steps = []
            while writer.busy:
                steps.append(step(small_model, small_optimizer, batch))
            timings.write.append(time.perf_counter() - start)
            outcome = writer.result()
            if not outcome or outcome.failure:
                raise SystemExit(f"the checkpoint was not written: {outcome}")
            timings.step_during.append(statistics.median(steps))
            timings.longest_during.append(max(steps))
            steps = [step(small_model, small_optimizer, batch) for _ in range(STEPS_ALONE)]
            timings.step_alone.append(statistics.median(steps))
    return timings, sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="whose state is saved")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()  # as a training run does
    torch.set_num_threads(1)

    timings, size = measure(options.model, options.repetitions)
    print(machine())
    print(
        f"{options.model} with momentum, {size / 2**20:.0f} MiB; one thread; "
        f"n = {options.repetitions} of each, interleaved, after one warm-up of each; seconds"
    )
    rows = [(title, spread(getattr(timings, name), 3)) for name, title in TITLES.items()]
    print(format_table(("", "median (range)"), rows))
    print(verdict("stall / copy", ratios(timings.stall, timings.copy), at_most=STALL_TARGET))
    slower = ratios(timings.step_during, timings.step_alone)
    print(f"step during the write / step alone: {spread(slower, 3)}")


if __name__ == "__main__":
    main()
