"""Large images in class folders (ImageNet's layout), decoded and augmented in loader workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from dist_graft.config import DataConfig
from dist_graft.errors import DataError
from dist_graft.seeding import stream_seed
from dist_graft.training.data.augment import Normalise
from dist_graft.training.data.decoding import Unreadable, read_image
from dist_graft.training.data.loader import shield_worker, start_loading
from dist_graft.training.data.order import (
    ALONE,
    Part,
    Share,
    batch_size_at,
    check_steps,
    choose_subsets,
    epoch_order,
)
from dist_graft.training.data.sources import Facts

IMAGENET_SIZE = 224

Sample = tuple[str, int]
"""Path of an image and its class."""
Place = tuple[int, int]
"""Position in the epoch and index of the sample there."""


class FolderImages:
    """ROOT/train/CLASS/* and ROOT/val/CLASS/*; implements Data (see the package).

    `val` is the test split here, as in ImageNet; a validation split is taken from `train`. The
    classes take turns in the fixed order of samples, so that the first N of them are balanced.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        network: int,
        device: torch.device,
        channels_last: bool,
        share: Share = ALONE,
    ) -> None:
        classes, self._train = _read_folder(Path(config.root) / "train")
        test_classes, self._test = _read_folder(Path(config.root) / "val")
        if classes != test_classes:
            odd = min(set(classes) ^ set(test_classes))
            lacking, having = ("val", "train") if odd in classes else ("train", "val")
            raise DataError(
                f"{Path(config.root) / lacking / odd} is missing, and there is a {having}/{odd}: "
                "train and val must have the same class folders"
            )
        self.num_classes = len(classes)
        self.channels = config.channels or 3
        self.image_size = config.image_size or IMAGENET_SIZE
        self._subsets = choose_subsets(
            config, seed=seed, train_total=len(self._train), test_total=len(self._test)
        )
        self.train_size = len(self._subsets.train)
        self.steps_per_epoch = -(-self.train_size // config.batch_size)
        self.has_validation = len(self._subsets.val) > 0
        self.skipped: dict[str, str] = {}
        self._config, self._seed, self._network = config, seed, network
        self._device = device
        self._share = share
        facts = Facts(
            num_classes=self.num_classes,
            mean=(0.485, 0.456, 0.406),
            deviation=(0.229, 0.224, 0.225),
        )
        mean, deviation = facts.statistics(self.channels)
        self._normalise = Normalise(mean, deviation, device=device, channels_last=channels_last)

    def part(self, step: int) -> Part:
        """As Data.part."""
        return self._share.of_batch(batch_size_at(step, self.train_size, self._config.batch_size))

    def train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As Data.train_batches."""
        check_steps(first, last, self.steps_per_epoch)
        return self._train_batches(epoch, first, last)

    def _train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(self.train_size, seed=self._seed, network=self._network, epoch=epoch)
        size = self._config.batch_size
        places = list(enumerate(self._subsets.train[order].tolist()))[first * size : last * size]
        transform = self._training() if self._config.augment else self._evaluation()
        images = _Images(self._train, transform, (self._seed, self._network, epoch))
        batches = self._cut(places)
        mine = [batch[self.part(step).positions] for step, batch in enumerate(batches, start=first)]
        for pixels, labels in self._batches(images, mine):
            if not len(labels):
                self._refuse_nothing(self._train, self._subsets.train)
            yield pixels, labels

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """As Data.eval_batches."""
        indices = self._subsets.evaluated(split, self._share)
        samples = self._test if split == "test" else self._train
        return self._eval_batches(samples, indices)

    def _eval_batches(
        self, samples: list[Sample], indices: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images = _Images(samples, self._evaluation(), None)
        for pixels, labels in self._batches(images, self._cut(list(enumerate(indices.tolist())))):
            if len(labels):
                yield pixels, labels
        self._refuse_nothing(samples, indices)

    def _cut(self, places: list[Place]) -> list[list[Place]]:
        size = self._config.batch_size
        return [places[start : start + size] for start in range(0, len(places), size)]

    def _training(self) -> v2.Compose:
        return v2.Compose(
            [
                *self._colours(),
                v2.RandomResizedCrop(self.image_size),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def _evaluation(self) -> v2.Compose:
        return v2.Compose(
            [
                *self._colours(),
                v2.Resize(round(self.image_size * 256 / 224)),
                v2.CenterCrop(self.image_size),
                v2.PILToTensor(),
            ]
        )

    def _colours(self) -> list[v2.Transform]:
        return [v2.Grayscale()] if self.channels == 1 else []

    def _batches(
        self, images: _Images, batches: list[list[Place]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self._config.workers,
            collate_fn=partial(_collate, shape=(self.channels, self.image_size, self.image_size)),
            pin_memory=self._device.type == "cuda",
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # the loader draws a seed: not from the trainer's stream
        )
        for pixels, labels, unreadable in start_loading(loader):
            for one in unreadable:
                self._leave_out(one)
            yield (
                self._normalise(pixels.to(self._device, non_blocking=True)),
                labels.to(self._device, non_blocking=True),
            )

    def _leave_out(self, one: Unreadable) -> None:
        """Count a broken image; DataError unless that was asked for."""
        if not one.broken:
            raise DataError(f"{one.path} cannot be read: {one.reason}")
        if not self._config.skip_broken:
            raise DataError(
                f"{one.path} cannot be read as an image: {one.reason}; repair or remove it, or "
                "leave out all such images with --data.skip_broken true"
            )
        self.skipped.setdefault(one.path, one.reason)

    def _refuse_nothing(self, samples: Sequence[Sample], indices: Tensor) -> None:
        """Raise DataError when all of these samples were left out."""
        paths = [samples[index][0] for index in indices.tolist()]
        if all(path in self.skipped for path in paths):
            raise DataError(
                f"none of {len(paths)} images can be read as one: "
                f"{paths[0]} cannot because {self.skipped[paths[0]]}"
            )


class _Images(Dataset[tuple[Tensor, int] | Unreadable]):
    """Decoded images (uint8 [channels, size, size]) with their classes, or why there is none."""

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Any], Tensor],
        stream: tuple[int, int, int] | None,
    ) -> None:
        """stream: (seed, network, epoch) that the augmentation is drawn for; None: no draws."""
        self._samples = samples
        self._transform = transform
        self._stream = stream

    def __getitem__(self, place: Place) -> tuple[Tensor, int] | Unreadable:
        position, index = place
        path, label = self._samples[index]
        image = read_image(path)
        if isinstance(image, Unreadable):
            return image
        if self._stream is None:
            return self._transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed("augment", *self._stream, position))
            return self._transform(image), label


def _collate(
    samples: list[tuple[Tensor, int] | Unreadable], *, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Images (uint8 [batch, *shape]) and classes (int64 [batch]) of what could be read."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    pixels = torch.empty(len(good), *shape, dtype=torch.uint8)
    if good:
        torch.stack([image for image, _ in good], out=pixels)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return pixels, labels, unreadable


def _read_folder(folder: Path) -> tuple[list[str], list[Sample]]:
    """Class names and samples of a folder, the classes taking turns; DataError when empty."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: imagefolder needs train/CLASS/* and val/CLASS/*")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders: imagefolder needs one for each class")
    content = ImageFolder(str(folder), allow_empty=True)
    turns: defaultdict[int, list[Sample]] = defaultdict(list)
    seen = [0] * len(content.classes)
    for path, label in content.samples:
        turns[seen[label]].append((path, label))
        seen[label] += 1
    if 0 in seen:
        raise DataError(
            f"{folder / content.classes[seen.index(0)]} holds no images "
            f"({', '.join(IMG_EXTENSIONS)}): put some there or remove the folder"
        )
    return content.classes, [sample for turn in turns.values() for sample in turn]
