"""Base class of the datasets: splits, epoch order, and each process's part of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.training.data.order import Part, Share, Subsets, epoch_order

Place = tuple[int, int]
"""Position in the epoch, and index of the sample in the dataset."""


class BaseData(ABC):
    """Splits and epoch order of a dataset; subclasses load the samples.

    Args: config: batch size and options of the loader. subsets: indices of each split. share: which
    of the network's processes this is.
    """

    def __init__(
        self,
        config: DataConfig,
        subsets: Subsets,
        *,
        seed: int,
        network: int,
        device: torch.device,
        share: Share,
    ) -> None:
        self.train_size = len(subsets.train)
        self.steps_per_epoch = -(-self.train_size // config.batch_size)
        self.has_validation = len(subsets.val) > 0
        self._config = config
        self._subsets = subsets
        self._seed, self._network = seed, network
        self._device = device
        self._share = share

    def part(self, step: int) -> Part:
        """See `Data.part`."""
        size = self._config.batch_size
        return self._share.of_batch(min(size, self.train_size - step * size))

    def train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]:
        """See `Data.train_batches`."""
        if not 0 <= first <= last <= self.steps_per_epoch:
            raise ValueError(
                f"steps must be within [0, {self.steps_per_epoch}], got first {first} "
                f"and last {last}"
            )
        return self._train_batches(epoch, first, last)

    @abstractmethod
    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]: ...

    def _local_places(self, epoch: int, first: int, last: int) -> Iterator[list[Place]]:
        """This process's part of each training batch of an epoch."""
        order = epoch_order(self.train_size, seed=self._seed, network=self._network, epoch=epoch)
        indices = self._subsets.train[order]
        for step in range(first, last):
            start = step * self._config.batch_size
            part = self.part(step).positions
            local = range(start + part.start, start + part.stop)
            yield list(zip(local, indices[local.start : local.stop].tolist(), strict=True))

    def _eval_places(self, indices: Tensor) -> Iterator[list[Place]]:
        """Evaluation batches; the position of a sample is its index."""
        for part in indices.split(self._config.batch_size):
            yield [(index, index) for index in part.tolist()]
