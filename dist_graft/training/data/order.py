"""Splits, epoch order and parts of a batch, as pure functions of the seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.seeding import stream_seed


@dataclass(frozen=True)
class Part:
    """The part of a network's batch that one process trains on."""

    positions: slice
    """Positions in the batch."""
    weight: float
    """Factor of the mean loss over this part: the mean of the weighted losses over all processes is
    the mean loss over the batch."""
    counts: bool
    """Whether this process includes the part in its metrics (another one may have it too)."""
    smallest: int
    """Samples in the smallest part of this batch."""


@dataclass(frozen=True)
class Share:
    """Index of a process among the processes that train one network."""

    replica: int = 0
    replicas: int = 1

    def of_batch(self, size: int) -> Part:
        """This process's part of a batch: contiguous, of nearly equal size for all processes.

        If the batch has fewer samples than there are processes, every process gets all of it.
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


SINGLE = Share()
"""The share of a process that trains its network alone."""


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Ascending indices (int64 vectors) of each split.

    train and val index the training set, test the test set.
    """

    train: Tensor
    val: Tensor
    test: Tensor

    def evaluated(self, split: str, share: Share) -> Tensor:
        """Indices of "test" or "val" that one process evaluates: a contiguous range.

        Raises: ConfigError if the split is empty or has fewer samples than there are processes.
        """
        indices = self.test if split == "test" else self.val
        if not len(indices):
            raise ConfigError("there is no validation split: data.val_fraction is 0")
        if len(indices) < share.replicas:
            raise ConfigError(
                f"the {split} split has {len(indices)} samples for {share.replicas} processes per "
                "network: lower runtime.replicas"
            )
        return indices[share.of_batch(len(indices)).positions]


def generator(purpose: str, *coordinates: int) -> torch.Generator:
    """CPU generator seeded with `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(purpose, *coordinates))


def choose_subsets(config: DataConfig, *, seed: int, train_total: int, test_total: int) -> Subsets:
    """Take the first N samples, then split off the same validation samples for every network.

    Args: train_total, test_total: sizes of the datasets; a larger N takes all samples.
    Raises: ConfigError if data.val_fraction leaves the training or the validation split empty.
    """
    size = min(config.train_samples or train_total, train_total)
    test = torch.arange(min(config.test_samples or test_total, test_total))
    held_out = round(size * config.val_fraction)
    if config.val_fraction > 0 and not 0 < held_out < size:
        raise ConfigError(
            f"data.val_fraction must leave samples on both sides of the split, "
            f"got {config.val_fraction!r} of {size} training samples"
        )
    shuffled = torch.randperm(size, generator=generator("validation", seed))
    val, train = shuffled[:held_out].sort().values, shuffled[held_out:].sort().values
    return Subsets(train=train, val=val, test=test)


def epoch_order(size: int, *, seed: int, network: int, epoch: int) -> Tensor:
    """Permutation (int64 [size]) in which a network sees its training samples in an epoch."""
    return torch.randperm(size, generator=generator("order", seed, network, epoch))
