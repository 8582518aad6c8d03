"""Base class of the datasets: splits, epoch order, and each process's part of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.config.validation import own_function
from dist_graft.errors import ConfigError, user_code
from dist_graft.seeding import stream_seed
from dist_graft.training.data.batch_augment import BatchAugment
from dist_graft.training.data.batches import batch_size
from dist_graft.training.data.order import Part, Share, Subsets, epoch_order

SampleKey = tuple[int, int]
"""Position in the epoch, and index of the sample in the dataset."""


def transform_function(config: DataConfig) -> Callable[[Any, torch.Generator], Any]:
    """Return the function of data.transform, with data.transform_kwargs.

    Raises: ConfigError if it does not exist or does not take these arguments.
    """
    assert config.transform is not None
    kwargs = config.transform_kwargs
    function = own_function("data.transform", config.transform, kwargs, arguments=2)
    return partial(function, **kwargs)


class BaseData(ABC):
    """Splits and epoch order of a dataset; subclasses load the samples.

    Args: config: batch size and options of the loader. subsets: indices of each split. share: which
    of the network's processes this is.
    """

    num_classes: int
    """Of image data; for data.mixup and data.cutmix."""

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
        return self._share.of_batch(self._batch_size(step))

    def _batch_size(self, step: int) -> int:
        """Samples in the batch of a step, over all processes of the network."""
        size = self._config.batch_size
        return min(size, self.train_size - step * size)

    def train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]:
        """See `Data.train_batches`."""
        if not 0 <= first <= last <= self.steps_per_epoch:
            raise ValueError(
                f"steps must be within [0, {self.steps_per_epoch}], got first {first} "
                f"and last {last}"
            )
        batches = self._train_batches(epoch, first, last)
        if self._config.mixes or self._config.random_erasing > 0:
            batches = self._augmented(batches, epoch, first)
        return (
            batches if self._config.transform is None else self._transformed(batches, epoch, first)
        )

    @abstractmethod
    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]:
        """Batches of the samples at `_positions`."""

    def _positions(self, step: int) -> slice:
        """Positions in a step's batch to load: the process's part, in whole pairs if it mixes."""
        positions = self.part(step).positions
        if not self._config.mixes:
            return positions
        stop = min(positions.stop + positions.stop % 2, self._batch_size(step))
        return slice(positions.start - positions.start % 2, stop)

    def _augmented(
        self, batches: Generator[tuple[Any, Any]], epoch: int, first: int
    ) -> Generator[tuple[Any, Any]]:
        augment = BatchAugment(self._config, self.num_classes)
        with closing(batches):
            for step, (images, labels) in enumerate(batches, first):
                loaded, part = self._positions(step), self.part(step).positions
                mixed = augment(
                    *(images, labels),
                    stream=(self._seed, self._network, epoch, step),
                    positions=loaded,
                    size=self._batch_size(step),
                )
                own = slice(part.start - loaded.start, part.stop - loaded.start)
                yield mixed[0][own], mixed[1][own]

    def _transformed(
        self, batches: Generator[tuple[Any, Any]], epoch: int, first: int
    ) -> Generator[tuple[Any, Any]]:
        """Apply the function of data.transform to this process's part of each batch.

        Its generator and torch's global ones are seeded for each batch and process.
        """
        what = f"data.transform {self._config.transform}"
        transform = transform_function(self._config)
        generator = torch.Generator(self._device)
        with closing(batches):
            for step, (inputs, targets) in enumerate(batches, first):
                size = batch_size(targets)
                if size:
                    place = (
                        self._seed,
                        self._network,
                        epoch,
                        step,
                        self.part(step).positions.start,
                    )
                    seed = stream_seed("transform", *place)
                    generator.manual_seed(seed)
                    torch.manual_seed(seed)
                    with user_code(what):
                        transformed = transform(inputs, generator)
                        given = batch_size(transformed)
                    if given != size:
                        raise ConfigError(f"{what} must return {size} samples, got {given}")
                yield (transformed if size else inputs), targets

    def _local_keys(self, epoch: int, first: int, last: int) -> Iterator[list[SampleKey]]:
        """This process's part of each training batch of an epoch."""
        order = epoch_order(self.train_size, seed=self._seed, network=self._network, epoch=epoch)
        indices = self._subsets.train[order]
        for step in range(first, last):
            start = step * self._config.batch_size
            part = self._positions(step)
            local = range(start + part.start, start + part.stop)
            yield list(zip(local, indices[local.start : local.stop].tolist(), strict=True))

    def _eval_keys(self, indices: Tensor) -> Iterator[list[SampleKey]]:
        """Evaluation batches; the position of a sample is its index."""
        for part in indices.split(self._config.batch_size):
            yield [(index, index) for index in part.tolist()]
