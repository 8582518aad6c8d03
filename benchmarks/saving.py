"""How long saving holds up the training, against copying the same state to host memory.

One process saves the state of a ResNet-50 and its SGD momentum (51 million numbers) as the trainer
does, in the background, and goes on with steps of a ResNet-20 while the file is written. In turn:
a plain copy of the same tensors, a set, steps beside the writing, steps without.

    python benchmarks/saving.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from reporting import machine, ratios, spread, table, verdict
from torch import nn

from dist_graft.config import ModelConfig
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.training.checkpoint.writer import CheckpointWriter
from dist_graft.training.models import build_model
from dist_graft.training.schedule import Position

HOLD_UP = 1.2


def trained(name: str, images: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after one step, so that its optimizer has momentum."""
    model = build_model(ModelConfig(name=name), num_classes=10, channels=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, images)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="whose state is saved")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    torch.set_num_threads(1)

    model, optimizer = trained(options.model, torch.randn(2, 3, 64, 64))
    beside, small = trained("resnet20", batch := torch.randn(32, 3, 32, 32))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tensors = [
        *model.state_dict().values(),
        *(entry["momentum_buffer"] for entry in optimizer.state.values()),
    ]
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    copying, holding, writing, meanwhile, longest, alone = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(0, None, seconds=lambda: 600.0, keep=2)
        for number in range(options.repetitions + 1):
            start = time.perf_counter()
            copied = [tensor.to("cpu", copy=True) for tensor in tensors]
            copying.append(time.perf_counter() - start)
            del copied

            position = Position(number + 1)
            start = time.perf_counter()
            writer.start(f"set {number}", Path(folder) / f"epoch_{number + 1:04d}", position, state)
            holding.append(time.perf_counter() - start)
            steps = []
            while writer.busy:
                clock = time.perf_counter()
                step(beside, small, batch)
                steps.append(time.perf_counter() - clock)
            writing.append(time.perf_counter() - start)
            outcome = writer.result()
            if not outcome or outcome.failure:
                raise SystemExit(f"the set was not written: {outcome}")
            meanwhile.append(statistics.median(steps))
            longest.append(max(steps))
            steps = []
            for _ in range(10):
                clock = time.perf_counter()
                step(beside, small, batch)
                steps.append(time.perf_counter() - clock)
            alone.append(statistics.median(steps))
    seen = (copying, holding, writing, meanwhile, longest, alone)
    copying, holding, writing, meanwhile, longest, alone = (values[1:] for values in seen)

    print(machine())
    print(
        f"{options.model} with momentum, {size:.0f} MiB; one thread; n = {options.repetitions} of "
        "each in turn, after one of each unseen; seconds"
    )
    rows = (
        ("copy to host memory", copying),
        ("hold-up by a set", holding),
        ("until the set is complete", writing),
        ("a step beside the writing", meanwhile),
        ("the longest step beside it", longest),
        ("a step alone", alone),
    )
    print(table(("", "median (range)"), [(name, spread(values, 3)) for name, values in rows]))
    print(verdict("hold-up over the copy", ratios(holding, copying), at_most=HOLD_UP))
    print(f"a step beside the writing over one alone: {spread(ratios(meanwhile, alone), 3)}")


if __name__ == "__main__":
    main()
