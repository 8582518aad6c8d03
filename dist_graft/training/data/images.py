"""Small images that live on the device as bytes: batches are cut out and augmented there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data.augment import Normalise, crop_and_flip, epoch_draws, pad_to
from dist_graft.training.data.order import (
    ALONE,
    Part,
    Share,
    batch_size_at,
    check_steps,
    choose_subsets,
    epoch_order,
)
from dist_graft.training.data.sources import Facts, ImageSet


def grey(images: Tensor) -> Tensor:
    """Luma of colour images (uint8 [n, 3, height, width]) by ITU-R BT.601, rounded as PIL does.

    Returns: uint8 [n, 1, height, width].
    """
    return torch.cat([_luma(part) for part in images.split(256)])


def _luma(images: Tensor) -> Tensor:
    # 0.299, 0.587 and 0.114 of 2^16; all sums stay below 2^24, so float32 is exact
    red, green, blue = images.unbind(dim=1)
    luma = red * 19595.0 + green * 38470.0
    luma.add_(blue, alpha=7471.0).add_(32768.0).div_(65536.0)
    return luma.to(torch.uint8)[:, None]


class ResidentImages:
    """A small data set, held on the device as uint8; implements Data (see the package)."""

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        facts: Facts,
        config: DataConfig,
        *,
        seed: int,
        network: int,
        device: torch.device,
        channels_last: bool,
        share: Share = ALONE,
    ) -> None:
        """train, test: all images of the data set; facts: what is known of it."""
        native_channels, side = train.images.shape[1:3]
        self.num_classes = facts.num_classes
        self.channels = config.channels or native_channels
        self.image_size = config.image_size or side
        if self.image_size < side:
            raise ConfigError(
                f"data.image_size must be at least {side} for {config.name}, "
                f"got {config.image_size!r}"
            )
        self._subsets = choose_subsets(
            config, seed=seed, train_total=len(train.images), test_total=len(test.images)
        )
        self.train_size = len(self._subsets.train)
        self.steps_per_epoch = -(-self.train_size // config.batch_size)
        self.has_validation = len(self._subsets.val) > 0
        self.skipped: dict[str, str] = {}
        self._batch_size = config.batch_size
        self._augment = config.augment
        self._seed, self._network, self._device = seed, network, device
        self._share = share
        used = self.train_size + len(self._subsets.val)
        self._train = self._resident(train, used)
        self._test = self._resident(test, len(self._subsets.test))
        mean, deviation = facts.statistics(self.channels)
        self._normalise = Normalise(mean, deviation, device=device, channels_last=channels_last)

    def part(self, step: int) -> Part:
        """As Data.part."""
        return self._share.of_batch(batch_size_at(step, self.train_size, self._batch_size))

    def train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As Data.train_batches."""
        check_steps(first, last, self.steps_per_epoch)
        return self._train_batches(epoch, first, last)

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """As Data.eval_batches."""
        indices = self._subsets.evaluated(split, self._share).to(self._device)
        return self._eval_batches(self._test if split == "test" else self._train, indices)

    def _train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        stream = {"seed": self._seed, "network": self._network, "epoch": epoch}
        order = self._subsets.train[epoch_order(self.train_size, **stream)].to(self._device)
        draws = epoch_draws(self.train_size, **stream).to(self._device)
        images, labels = self._train
        for step in range(first, last):
            whole = slice(step * self._batch_size, (step + 1) * self._batch_size)
            mine = self.part(step).positions
            chosen = order[whole][mine]
            if self._augment:
                batch = crop_and_flip(images[chosen], draws[whole][mine], self.image_size)
            else:
                batch = pad_to(images[chosen], self.image_size)
            yield self._normalise(batch), labels[chosen]

    def _eval_batches(
        self, source: tuple[Tensor, Tensor], indices: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = source
        for chosen in indices.split(self._batch_size):
            yield self._normalise(pad_to(images[chosen], self.image_size)), labels[chosen]

    def _resident(self, source: ImageSet, count: int) -> tuple[Tensor, Tensor]:
        """The first count images (uint8, with the channels asked for) and labels, on the device."""
        images = torch.from_numpy(source.images[:count])
        labels = torch.from_numpy(source.labels[:count]).to(self._device)
        if images.shape[1] > self.channels:
            images = grey(images)
        # expand shares memory, so grey images take no more room as colour ones
        return images.to(self._device).expand(-1, self.channels, -1, -1), labels
