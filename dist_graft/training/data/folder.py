"""Large images in class folders (ImageNet's layout), decoded and augmented in loader workers."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from dist_graft.config import DataConfig
from dist_graft.errors import DataError
from dist_graft.seeding import stream_seed
from dist_graft.training.data.augment import Normalize
from dist_graft.training.data.base import BaseData, SampleKey
from dist_graft.training.data.loader import start_loading, worker_count
from dist_graft.training.data.order import SINGLE, Share, choose_subsets
from dist_graft.training.data.sources import DatasetInfo

IMAGENET_SIZE = 224

Sample = tuple[str, int]
"""Path of an image and its class."""


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
        classes, self._train = _read_folder(Path(config.root) / "train")
        test_classes, self._test = _read_folder(Path(config.root) / "val")
        if classes != test_classes:
            name = min(set(classes) ^ set(test_classes))
            missing, present = ("val", "train") if name in classes else ("train", "val")
            raise DataError(
                f"{Path(config.root) / missing / name} is missing, but {present}/{name} exists: "
                "train and val must have the same class folders"
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

    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Tensor, Tensor]]:
        transform = self._train_transform() if self._config.augment else self._eval_transform()
        images = _Images(self._train, transform, (self._seed, self._network, epoch))
        for pixels, labels in self._batches(images, self._local_keys(epoch, first, last)):
            if not len(labels):
                self._raise_if_all_skipped(self._train, self._subsets.train)
            yield pixels, labels

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.eval_batches`."""
        indices = self._subsets.evaluated(split, self._share)
        return self._eval_batches(self._test if split == "test" else self._train, indices)

    def _eval_batches(
        self, samples: Sequence[Sample], indices: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images = _Images(samples, self._eval_transform(), None)
        for pixels, labels in self._batches(images, self._eval_keys(indices)):
            if len(labels):
                yield pixels, labels
        self._raise_if_all_skipped(samples, indices)

    def _train_transform(self) -> v2.Compose:
        return v2.Compose(
            [
                *self._color_transforms(),
                v2.RandomResizedCrop(self.image_size),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def _eval_transform(self) -> v2.Compose:
        return v2.Compose(
            [
                *self._color_transforms(),
                v2.Resize(round(self.image_size * 256 / 224)),
                v2.CenterCrop(self.image_size),
                v2.PILToTensor(),
            ]
        )

    def _color_transforms(self) -> list[v2.Transform]:
        return [v2.Grayscale()] if self.channels == 1 else []

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

    def _raise_if_all_skipped(self, samples: Sequence[Sample], indices: Tensor) -> None:
        paths = [samples[index][0] for index in indices.tolist()]
        if all(path in self.skipped for path in paths):
            raise DataError(
                f"none of {len(paths)} images can be read; "
                f"the first is {paths[0]}: {self.skipped[paths[0]]}"
            )


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded.

    Returned rather than raised, because a loader worker wraps exceptions into its traceback.
    """

    path: str
    reason: str
    """One line."""
    broken: bool
    """True if the content is damaged, False if the system cannot read the file."""


def read_image(path: str) -> Image.Image | Unreadable:
    """Decode a file to RGB. Transparency is dropped and the EXIF orientation ignored."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Unreadable(path, error.strerror or str(error), broken=False)
    if not content:
        return Unreadable(path, "file is empty", broken=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transparency and metadata, which are not used
            with Image.open(io.BytesIO(content)) as image:
                return _as_rgb(image)
    except UnidentifiedImageError:
        return Unreadable(path, "unknown image format", broken=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Unreadable(path, " ".join(str(error).split()), broken=True)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32-bit pixels of unknown range are not supported")
    if image.mode.startswith("I"):  # 16 bits: keep the high byte, convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


class _Images(Dataset[tuple[Tensor, int] | Unreadable]):
    """Decodes images to (uint8 [channels, size, size], class), or to the reason of a failure.

    Args: stream: (seed, network, epoch) that seeds the augmentation; None for no random draws.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Any], Tensor],
        stream: tuple[int, int, int] | None,
    ) -> None:
        self._samples = samples
        self._transform = transform
        self._stream = stream

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int] | Unreadable:
        position, index = key
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
    """Images (uint8 [batch, *shape]) and classes (int64 [batch]) of the readable samples."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    pixels = torch.empty(len(readable), *shape, dtype=torch.uint8)
    if readable:
        torch.stack([image for image, _ in readable], out=pixels)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return pixels, labels, unreadable


def _read_folder(folder: Path) -> tuple[list[str], list[Sample]]:
    """Class names and samples of a folder, round-robin over the classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: imagefolder needs train/CLASS/* and val/CLASS/*")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders: imagefolder needs one per class")
    content = ImageFolder(str(folder), allow_empty=True)
    rounds: defaultdict[int, list[Sample]] = defaultdict(list)
    counts = [0] * len(content.classes)
    for path, label in content.samples:
        rounds[counts[label]].append((path, label))
        counts[label] += 1
    if 0 in counts:
        raise DataError(
            f"{folder / content.classes[counts.index(0)]} has no images "
            f"({', '.join(IMG_EXTENSIONS)}): add some or remove the folder"
        )
    return content.classes, [sample for samples in rounds.values() for sample in samples]
