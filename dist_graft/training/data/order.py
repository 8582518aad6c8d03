"""Which images are trained on, in which order: pure functions of the seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.seeding import stream_seed


@dataclass(frozen=True)
class Part:
    """What one process trains on of a batch that its network sees."""

    positions: slice
    """Of the batch."""
    weight: float
    """What the mean loss over these is multiplied with, so that the mean over the processes is the
    mean over the batch."""
    counts: bool
    """Whether these images are this process's to count."""
    smallest: int
    """Images of the smallest part of this batch."""


@dataclass(frozen=True)
class Share:
    """A process among those that train one network together."""

    replica: int = 0
    replicas: int = 1

    def of_batch(self, size: int) -> Part:
        """Neighbouring positions, as many for each process; all of a batch that is too small.

        Args: size: images of the batch.
        """
        if size < self.replicas:
            return Part(slice(0, size), 1.0, counts=self.replica == 0, smallest=size)
        first, last = (size * edge // self.replicas for edge in (self.replica, self.replica + 1))
        return Part(
            slice(first, last),
            self.replicas * (last - first) / size,
            counts=True,
            smallest=size // self.replicas,
        )


ALONE = Share()
"""A process that trains its network by itself."""


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Indices of the images of each split, int64 vectors in rising order.

    train and val index the training set, test the test set.
    """

    train: Tensor
    val: Tensor
    test: Tensor

    def evaluated(self, split: str, share: Share) -> Tensor:
        """Indices of the split "test" or "val" that a process evaluates, neighbours.

        Raises: ConfigError when no images are kept for it, or fewer than there are processes.
        """
        indices = self.test if split == "test" else self.val
        if not len(indices):
            raise ConfigError("there is no validation split: data.val_fraction is 0")
        if len(indices) < share.replicas:
            raise ConfigError(
                f"the {split} split has {len(indices)} images for {share.replicas} processes of a "
                "network: lower runtime.replicas"
            )
        return indices[share.of_batch(len(indices)).positions]


def batch_size_at(step: int, train_size: int, batch_size: int) -> int:
    """Images of the batch of a step; the last one of an epoch may be smaller."""
    return min(batch_size, train_size - step * batch_size)


def generator(purpose: str, *coordinates: int) -> torch.Generator:
    """CPU generator of one stream of draws (see stream_seed)."""
    return torch.Generator().manual_seed(stream_seed(purpose, *coordinates))


def choose_subsets(config: DataConfig, *, seed: int, train_total: int, test_total: int) -> Subsets:
    """Take the first N images, then a validation split that is the same for every network.

    Args: train_total, test_total: images that there are; asking for more takes them all.
    Raises: ConfigError when a validation split is asked for and it would be empty, or would
    leave no image to train on.
    """
    size = min(config.train_samples or train_total, train_total)
    test = torch.arange(min(config.test_samples or test_total, test_total))
    kept = round(size * config.val_fraction)
    if config.val_fraction > 0 and not 0 < kept < size:
        raise ConfigError(
            f"data.val_fraction must leave images on both sides of the split, "
            f"got {config.val_fraction!r} of {size} training images"
        )
    shuffled = torch.randperm(size, generator=generator("validation", seed))
    val, train = shuffled[:kept].sort().values, shuffled[kept:].sort().values
    return Subsets(train=train, val=val, test=test)


def epoch_order(size: int, *, seed: int, network: int, epoch: int) -> Tensor:
    """Permutation of size positions (int64) in which one network sees its images."""
    return torch.randperm(size, generator=generator("order", seed, network, epoch))


def check_steps(first: int, last: int, steps_per_epoch: int) -> None:
    """Raise ValueError when first … last − 1 are not steps of an epoch."""
    if not 0 <= first <= last <= steps_per_epoch:
        raise ValueError(
            f"steps must be within [0, {steps_per_epoch}], got first {first} and last {last}"
        )
