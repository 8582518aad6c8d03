"""Speed of image folders: rounds between the steps, large folders, decoding.

Three parts, on JPEG files that it makes:
- Training of a small network that grafts itself after every step, relative to the same without
  rounds. Image folder with loader workers; whole epochs, including the start of the workers.
- A folder with as many files as ImageNet, made as a list of names that all lead to a few files: the
  work between two segments (the stretches between rounds), at the start of an epoch, and memory.
- Images per second of one core: PIL, as torchvision's transforms use it, and dist_graft's decoding.

    python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from PIL import Image
from reporting import machine, ratios, spread, verdict
from torch import nn
from torchvision.transforms import v2

from dist_graft import Callback, Trainer
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    GraftConfig,
    MonitorConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.printing import format_table
from dist_graft.training.data import decoding
from dist_graft.training.data.base import BaseData
from dist_graft.training.data.image_files import ImageFiles
from dist_graft.training.schedule import Segment

MIN_THROUGHPUT, MAX_BETWEEN_MS, MIN_DECODING = 0.97, 1.0, 1.2
CLASSES, PER_CLASS = 1000, 1281
POOL = 64
"""Image files that all names of the large folder lead to."""


def save(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Save JPEG files 00.jpg, 01.jpg, ...; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:02}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photo(width, height, number).save(path, quality=92)
    return paths


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Return smooth structures of several sizes and some noise, as in a photograph."""
    generator = np.random.default_rng(seed)
    pixels = generator.normal(128, 3, (height, width, 1)).repeat(3, axis=2)
    for cell, contrast in ((2, 10), (4, 15), (8, 20), (16, 25), (64, 60)):
        coarse = generator.normal(0, contrast, (height // cell + 2, width // cell + 2, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(
                layer.resize((width, height), Image.Resampling.BICUBIC)
            )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tiny(classes: int) -> nn.Module:
    """Return a network whose step is short next to the loading of its batch."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip


class Stopwatch(Callback):
    """Images per second of each epoch, from its start to the end of its last step."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._start = time.perf_counter()

    def on_evaluate_start(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self._start
        assert trainer.progress.trained is not None
        self.speeds.append(trainer.progress.trained.samples / seconds)


class Enough(Exception):  # noqa: N818  not an error
    """Enough segments have been measured."""


class Timed(Trainer):
    """Times rounds, and what happens between the steps before and after them."""

    max_segments: int | None = None
    """Stop after so many."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds: list[float] = []
        """Seconds."""
        self.between: list[float] = []
        """Seconds from the end of a step to the request for a batch, without the round."""
        self.requests: list[list[float]] = []
        """CPU seconds in each request for a batch, by segment."""
        self.step_end = 0.0

    def graft_round(self, segment: Segment) -> None:
        start = time.perf_counter()
        super().graft_round(segment)
        self.rounds.append(time.perf_counter() - start)

    def train_segment(self, segment: Segment, batches: Iterator[tuple[Any, Any]]) -> None:
        if len(self.requests) == self.max_segments:
            raise Enough
        self.requests.append([])
        super().train_segment(segment, self._watched(batches))

    def _watched(self, batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        if len(self.requests) > 1:
            self.between.append(time.perf_counter() - self.step_end - self.rounds[-1])
        while True:
            start = time.thread_time()
            batch = next(batches)
            self.requests[-1].append(time.thread_time() - start)
            yield batch

    def milliseconds_between(self) -> list[float]:
        """Work between two segments, and what the first request takes longer than the others."""
        first, *others = zip(*self.requests[1:], strict=True)  # the very first starts the workers
        more = statistics.median(first) - statistics.median(itertools.chain(*others))
        return [1e3 * (seconds + max(0.0, more)) for seconds in self.between]


class StepEnd(Callback):
    """Notes the end of each step."""

    def on_step_end(self, trainer: Trainer) -> None:
        cast(Timed, trainer).step_end = time.perf_counter()


def config(
    root: Path, run_dir: Path, options: argparse.Namespace, *, image_size: int = 224, **more: Any
) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        data=DataConfig(
            name="imagefolder",
            root=str(root),
            batch_size=options.batch_size,
            workers=options.workers,
            image_size=image_size,
        ),
        runtime=RuntimeConfig(device="cpu", threads=1),
        checkpoint=CheckpointConfig(every=0),
        monitor=MonitorConfig(tensorboard=False, progress="lines"),
        **more,
    )


def rounds(every_steps: int) -> GraftConfig:
    return GraftConfig(source="internal", every_steps=every_steps, lead="conv+linear")


def compare_rounds(
    folder: Path, options: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """Return images/s with and without rounds, and the milliseconds of a round."""
    root = folder / "small"
    for split, count in (("train", options.steps * options.batch_size), ("val", 2)):
        (root / split / "one").mkdir(parents=True)
        for number in range(count):
            (root / split / "one" / f"{number}.jpg").symlink_to(folder / f"{number % POOL:02}.jpg")
    speeds: dict[bool, list[float]] = {True: [], False: []}
    round_ms = []
    for repetition in range(options.repetitions + 1):
        for has_rounds in (True, False) if repetition % 2 else (False, True):
            more = {"graft": rounds(1)} if has_rounds else {"method": "none"}
            watch = Stopwatch()
            trainer = Timed(
                config(root, folder / f"run{repetition}{has_rounds}", options, epochs=1, **more),
                model=lambda: tiny(1),
                callbacks=[watch],
            )
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit()
            if repetition:  # after a warm-up
                speeds[has_rounds] += watch.speeds
                if has_rounds:
                    round_ms.append(1e3 * statistics.median(trainer.rounds))
    return speeds[True], speeds[False], round_ms


def imagenet_names() -> Iterator[tuple[str, list[str]]]:
    """Names as long as ImageNet's (23 bytes) that lead to the pool, by class."""
    for label in range(CLASSES):
        yield (
            f"n{label:08}",
            [f"././././../../../{(label + number) % POOL:02}.jpg" for number in range(PER_CLASS)],
        )


def large_folder(folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the milliseconds between segments, and of an epoch's index."""
    train = folder / "large" / "train"
    for label in range(CLASSES):
        (train / f"n{label:08}").mkdir(parents=True)
    files = ImageFiles.of_classes(train, imagenet_names())
    with (
        mock.patch.object(ImageFiles, "read", return_value=files),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        trainer = Timed(
            # Small images: the time to normalize a batch varies by more than a millisecond.
            config(
                train.parent,
                folder / "run_large",
                options,
                image_size=32,
                epochs=1,
                graft=rounds(5),
            ),
            model=lambda: tiny(CLASSES),
            callbacks=[StepEnd()],
        )
        trainer.max_segments = 20
        with contextlib.suppress(Enough):
            trainer.fit()
    data = cast(BaseData, trainer.data)
    index_ms = []
    for epoch in range(options.repetitions):
        start = time.process_time()
        next(data._local_keys(epoch, 0, data.steps_per_epoch))
        index_ms.append(1e3 * (time.process_time() - start))
    return trainer.milliseconds_between(), index_ms


def tuples() -> list[tuple[str, int]]:
    """Return the samples as `torchvision.datasets.ImageFolder` keeps them."""
    return [
        (f"data/train/{name}/{file}", label)
        for label, (name, files) in enumerate(imagenet_names())
        for file in files
    ]


def arrays() -> ImageFiles:
    return ImageFiles.of_classes(Path("data/train"), imagenet_names())


def private_mb() -> float:
    """Memory of this process that it shares with no other one, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def in_fork(measure: Callable[[], list[float]]) -> list[float]:
    """Call a function in a forked process."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        sender.send(measure())
        os._exit(0)
    os.waitpid(pid, 0)
    values: list[float] = receiver.recv()
    return values


def memory_mb(make: Callable[[], Any]) -> list[float]:
    """MB of a list of files, and of its copies in a worker that has read all of it."""

    def in_worker(samples: Any) -> list[float]:
        before = private_mb()
        for index in range(len(samples)):
            _path, _label = samples[index]
        return [private_mb() - before]

    def measure() -> list[float]:
        before = private_mb()
        samples = make()
        return [private_mb() - before, *in_fork(lambda: in_worker(samples))]

    return in_fork(measure)


def decoding_speeds(files: Sequence[Path], repetitions: int) -> dict[str, list[float]]:
    """Images per second of one core, by method; random crops of 224 pixels."""
    pil_crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    crop = decoding.RandomCrop(224, 3)

    def by_pil(path: Path) -> None:
        with Image.open(path) as image:
            pil_crop(image.convert("RGB"))

    def by_dist_graft(path: Path) -> None:
        decoding.read_image(path, crop)

    def without_torchvision(path: Path) -> None:
        with mock.patch.object(decoding, "decode_jpeg", None):
            by_dist_graft(path)

    methods = {
        "PIL and its transforms": by_pil,
        "dist_graft": by_dist_graft,
        "dist_graft, PIL's decoder": without_torchvision,
    }
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for repetition, (name, method) in itertools.product(range(repetitions + 1), methods.items()):
        torch.manual_seed(repetition)
        start = time.process_time()
        for path in files:
            method(path)
        if repetition:  # after a warm-up
            speeds[name].append(len(files) / (time.process_time() - start))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="per epoch, with rounds at each")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()

    print(machine())
    print(f"n = {options.repetitions} of each, interleaved; {options.workers} workers")
    # Before this process has threads and memory of its own.
    memory = {"tuples": memory_mb(tuples), "arrays": memory_mb(arrays)}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = save(folder, 500, 375, POOL)
        large = save(folder / "photos", 2000, 1500, 8)
        with_rounds, without, round_ms = compare_rounds(folder, options)
        between, index = large_folder(folder, options)
        decoded = {
            "500 x 375": decoding_speeds(small[:16], options.repetitions),
            "2000 x 1500": decoding_speeds(large, options.repetitions),
        }
    print(f"\n{options.steps} steps of {options.batch_size} images, 500 x 375 pixels")
    rows = [
        ("a round after every step", spread(with_rounds, 0), spread(round_ms)),
        ("no rounds", spread(without, 0), ""),
    ]
    print(format_table(("", "images/s", "ms per round"), rows))
    print(f"\n{CLASSES * PER_CLASS:,} files in {CLASSES} classes")
    rows = [
        ("ms between two segments", spread(between)),
        ("CPU ms for the index of an epoch", spread(index, 0)),
        *((f"MB, {name}", f"{own:.0f}") for name, (own, _) in memory.items()),
        *((f"MB copied by a worker, {name}", f"{copy:.0f}") for name, (_, copy) in memory.items()),
    ]
    print(format_table(("", ""), rows))
    print("\nimages/s of one core")
    methods = decoded["500 x 375"]
    rows = [(name, *(spread(speeds[name], 0) for speeds in decoded.values())) for name in methods]
    print(format_table(("", *decoded), rows))
    relative = ratios(with_rounds, without)
    print(verdict("images/s, rounds after every step / none", relative, at_least=MIN_THROUGHPUT))
    print(verdict("ms between two segments", between, at_most=MAX_BETWEEN_MS))
    for size, speeds in decoded.items():
        relative = ratios(speeds["dist_graft"], speeds["PIL and its transforms"])
        print(verdict(f"decoding {size} / PIL", relative, at_least=MIN_DECODING))


if __name__ == "__main__":
    main()
