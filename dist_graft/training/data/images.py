"""Small image datasets, kept on the device as uint8 and augmented there."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Literal

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data.augment import (
    Normalize,
    crop_and_flip,
    epoch_draws,
    pad_to,
    rand_augment,
)
from dist_graft.training.data.base import BaseData
from dist_graft.training.data.order import SINGLE, Share, choose_subsets, epoch_order
from dist_graft.training.data.preprocessing import Preprocessing
from dist_graft.training.data.sources import DatasetInfo, ImageSet

PREPARED_BYTES = 2**25
"""Size of the float32 images that an accelerator prepares at once."""


def steps_at_once(device: torch.device, batch_bytes: int) -> int:
    """Number of batches to prepare together; on a CPU 1, which fits into its caches.

    On an accelerator, small kernels take less time than their launches.
    """
    return 1 if device.type == "cpu" else max(1, PREPARED_BYTES // batch_bytes)


def grayscale(images: Tensor) -> Tensor:
    """Luma of RGB images (ITU-R BT.601), rounded like PIL.

    Args: images: uint8 [n, 3, height, width].
    Returns: uint8 [n, 1, height, width].
    """
    return torch.cat([_luma(part) for part in images.split(256)])


def _luma(images: Tensor) -> Tensor:
    # 0.299, 0.587 and 0.114 times 2^16; all sums stay below 2^24, so float32 is exact
    red, green, blue = images.unbind(dim=1)
    luma = red * 19595.0 + green * 38470.0
    luma.add_(blue, alpha=7471.0).add_(32768.0).div_(65536.0)
    return luma.to(torch.uint8)[:, None]


class ResidentImages(BaseData):
    """A small image dataset in device memory; implements `ImageData`.

    Args: train, test: all images of the dataset. info: its classes and statistics.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        info: DatasetInfo,
        config: DataConfig,
        *,
        seed: int,
        network: int,
        device: torch.device,
        channels_last: bool,
        share: Share = SINGLE,
    ) -> None:
        native_channels, side = train.images.shape[1:3]
        self.num_classes = info.num_classes
        self.channels = config.channels or native_channels
        self.image_size = config.image_size or side
        if self.image_size < side:
            raise ConfigError(
                f"data.image_size must be at least {side} for {config.name}, "
                f"got {config.image_size!r}"
            )
        subsets = choose_subsets(
            config, seed=seed, train_total=len(train.images), test_total=len(test.images)
        )
        super().__init__(config, subsets, seed=seed, network=network, device=device, share=share)
        self.workers = 0
        self.skipped: dict[str, str] = {}
        self._train = self._resident(train, self.train_size + len(subsets.val))
        self._test = self._resident(test, len(subsets.test))
        mean, std = info.statistics(self.channels)
        self._normalize = Normalize(mean, std, device=device, channels_last=channels_last)
        self.classes = list(info.classes or map(str, range(info.num_classes)))
        self.preprocessing = Preprocessing(
            channels=self.channels,
            resize=side,
            crop=side,
            image_size=self.image_size,
            mean=mean,
            std=std,
        )
        self._rand_augment = rand_augment(config)
        self._steps_at_once = steps_at_once(
            device, 4 * config.batch_size * self.channels * self.image_size**2
        )

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.eval_batches`."""
        indices = self._subsets.evaluated(split, self._share).to(self._device)
        return self._eval_batches(self._test if split == "test" else self._train, indices)

    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Tensor, Tensor]]:
        stream = {"seed": self._seed, "network": self._network, "epoch": epoch}
        order = self._subsets.train[epoch_order(self.train_size, **stream)].to(self._device)
        draws = epoch_draws(self.train_size, **stream).to(self._device)
        images, labels = self._train
        for start in range(first, last, self._steps_at_once):
            steps = range(start, min(start + self._steps_at_once, last))
            places = [self._epoch_positions(step) for step in steps]
            indices = torch.cat([order[place] for place in places])
            if self._config.augment:
                rows = torch.cat([draws[place] for place in places])
                pixels = crop_and_flip(images[indices], rows, self.image_size)
            else:
                pixels = pad_to(images[indices], self.image_size)
            sizes = [place.stop - place.start for place in places]
            if self._rand_augment:
                parts = zip(pixels.split(sizes), places, strict=True)
                pixels = torch.cat(
                    [self._rand_augment.each(part, at.start, **stream) for part, at in parts]
                )
            pairs = self._normalize(pixels).split(sizes), labels[indices].split(sizes)
            for inputs, targets in zip(*pairs, strict=True):
                # A copy has the same alignment, and so the same kernels, wherever a run resumes.
                yield (inputs, targets) if len(sizes) == 1 else (inputs.clone(), targets.clone())

    def _epoch_positions(self, step: int) -> slice:
        """Positions in the epoch that this process loads for a step."""
        start, local = step * self._config.batch_size, self._positions(step)
        return slice(start + local.start, start + local.stop)

    def _eval_batches(
        self, source: tuple[Tensor, Tensor], indices: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = source
        for part in indices.split(self._config.batch_size):
            yield self._normalize(pad_to(images[part], self.image_size)), labels[part]

    def _resident(self, source: ImageSet, count: int) -> tuple[Tensor, Tensor]:
        """The first count images (uint8 [count, self.channels, ...]) and labels on the device."""
        images = torch.from_numpy(source.images[:count])
        labels = torch.from_numpy(source.labels[:count]).to(self._device)
        if images.shape[1] > self.channels:
            images = grayscale(images)
        # expand() shares memory between the channels of a grayscale image
        return images.to(self._device).expand(-1, self.channels, -1, -1), labels
