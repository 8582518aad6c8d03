"""Large images in class folders (ImageNet's layout), decoded and augmented in loader workers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_graft.config import DataConfig
from dist_graft.errors import DataError
from dist_graft.seeding import stream_seed
from dist_graft.training.data.augment import Normalize, RandAugment, rand_augment
from dist_graft.training.data.base import BaseData, SampleKey
from dist_graft.training.data.decoding import (
    CenterCrop,
    RandomCrop,
    Transform,
    Unreadable,
    display_path,
    read_image,
)
from dist_graft.training.data.image_files import ImageFiles
from dist_graft.training.data.loader import start_loading, worker_count
from dist_graft.training.data.order import SINGLE, Share, choose_subsets
from dist_graft.training.data.preprocessing import Preprocessing
from dist_graft.training.data.sources import DatasetInfo

IMAGENET_SIZE = 224


class FolderImages(BaseData):
    """Images in ROOT/train/CLASS/* and ROOT/val/CLASS/*; implements `ImageData`.

    As in ImageNet, `val` is the test split; a validation split is taken from `train`. Samples are
    ordered round-robin over the classes, so that the first N of them are balanced.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        network: int,
        device: torch.device,
        channels_last: bool,
        share: Share = SINGLE,
    ) -> None:
        self._train = ImageFiles.read(Path(config.root) / "train")
        self._test = ImageFiles.read(Path(config.root) / "val")
        classes, test_classes = self._train.classes, self._test.classes
        if classes != test_classes:
            name = min(set(classes) ^ set(test_classes))
            missing, present = ("val", "train") if name in classes else ("train", "val")
            raise DataError(
                f"{display_path(Path(config.root) / missing / name)} is missing, but "
                f"{display_path(Path(present, name))} exists: train and val must have the same "
                "class folders"
            )
        subsets = choose_subsets(
            config, seed=seed, train_total=len(self._train), test_total=len(self._test)
        )
        super().__init__(config, subsets, seed=seed, network=network, device=device, share=share)
        self.num_classes = len(classes)
        self.channels = config.channels or 3
        self.image_size = config.image_size or IMAGENET_SIZE
        self.workers = worker_count("auto" if config.workers is None else config.workers)
        self.skipped: dict[str, str] = {}
        info = DatasetInfo(
            num_classes=self.num_classes, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )
        mean, std = info.statistics(self.channels)
        self._normalize = Normalize(mean, std, device=device, channels_last=channels_last)
        self.classes = classes
        self.preprocessing = Preprocessing(
            channels=self.channels,
            resize=CenterCrop(self.image_size, self.channels).resize,
            crop=self.image_size,
            image_size=self.image_size,
            mean=mean,
            std=std,
        )

    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Tensor, Tensor]]:
        kind = RandomCrop if self._config.augment else CenterCrop
        transform = kind(self.image_size, self.channels)
        stream = (self._seed, self._network, epoch)
        images = _Images(self._train, transform, stream, rand_augment(self._config))
        for pixels, labels in self._batches(images, self._local_keys(epoch, first, last)):
            if not len(labels):
                self._raise_if_all_skipped(self._train, self._subsets.train)
            yield pixels, labels

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.eval_batches`."""
        indices = self._subsets.evaluated(split, self._share)
        return self._eval_batches(self._test if split == "test" else self._train, indices)

    def _eval_batches(self, files: ImageFiles, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images = _Images(files, CenterCrop(self.image_size, self.channels), None)
        for pixels, labels in self._batches(images, self._eval_keys(indices)):
            if len(labels):
                yield pixels, labels
        self._raise_if_all_skipped(files, indices)

    def _batches(
        self, images: _Images, batches: Iterable[list[SampleKey]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        shape = (self.channels, self.image_size, self.image_size)
        for pixels, labels, unreadable in start_loading(
            images,
            batches,
            workers=self.workers,
            device=self._device,
            collate=partial(_collate, shape=shape),
        ):
            for file in unreadable:
                self._skip(file)
            yield (
                self._normalize(pixels.to(self._device, non_blocking=True)),
                labels.to(self._device, non_blocking=True),
            )

    def _skip(self, file: Unreadable) -> None:
        """Record a broken image; DataError unless data.skip_broken."""
        if not file.broken:
            raise DataError(f"{file.path} cannot be read: {file.reason}")
        if not self._config.skip_broken:
            raise DataError(
                f"{file.path} cannot be read as an image: {file.reason}; repair or remove it, or "
                "skip all broken images with --data.skip_broken true"
            )
        self.skipped.setdefault(file.path, file.reason)

    def _raise_if_all_skipped(self, files: ImageFiles, indices: Tensor) -> None:
        if len(self.skipped) < len(indices):
            return
        paths = [display_path(files[index][0]) for index in indices.tolist()]
        if all(path in self.skipped for path in paths):
            raise DataError(
                f"none of {len(paths)} images can be read; "
                f"the first is {paths[0]}: {self.skipped[paths[0]]}"
            )


class _Images(Dataset[tuple[Tensor, int] | Unreadable]):
    """Decodes images to (uint8 [channels, size, size], class), or to the reason of a failure.

    Args: stream: (seed, network, epoch) that seeds the augmentation; None for no random draws.
    rand_augment: of the transformed image, from the same stream.
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: Transform,
        stream: tuple[int, int, int] | None,
        rand_augment: RandAugment | None = None,
    ) -> None:
        self._files = files
        self._transform = transform
        self._stream = stream
        self._rand_augment = rand_augment

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int] | Unreadable:
        position, index = key
        path, label = self._files[index]
        if self._stream is None:
            image = read_image(path, self._transform)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(stream_seed("augment", *self._stream, position))
                image = read_image(path, self._transform)
                if self._rand_augment and not isinstance(image, Unreadable):
                    image = self._rand_augment(image)
        return image if isinstance(image, Unreadable) else (image, label)


def _collate(
    samples: list[tuple[Tensor, int] | Unreadable], *, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Images (uint8 [batch, *shape]) and classes (int64 [batch]) of the readable samples."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    pixels = torch.empty(len(readable), *shape, dtype=torch.uint8)
    if readable:
        torch.stack([image for image, _ in readable], out=pixels)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return pixels, labels, unreadable
