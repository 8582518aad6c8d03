"""User-defined datasets: any map-style torch dataset of (input, target) pairs, for any task."""

from __future__ import annotations

import random
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError, DataError, SampleError, StoppedError
from dist_graft.seeding import stream_seed
from dist_graft.training.data.base import BaseData, SampleKey
from dist_graft.training.data.batches import map_tensors
from dist_graft.training.data.loader import start_loading, worker_count
from dist_graft.training.data.order import SINGLE, Share, choose_subsets

_IMAGE_OPTIONS = (
    *("image_size", "channels", "augment", "skip_broken"),
    *("mixup", "cutmix", "random_erasing", "rand_augment"),
)


class MapStyleDataset(Protocol):
    """A dataset with a length and integer indices, such as `torch.utils.data.Dataset`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """An (input, target) pair."""
        ...


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """Map-style datasets to train and evaluate on.

    A sample is an (input, target) pair of anything that `torch.utils.data.default_collate` accepts:
    tensors, NumPy arrays, numbers, strings, and dicts, tuples and lists of them.

    The `Trainer` shuffles and batches the samples, also for several processes per network: use no
    sampler. Before each sample is fetched, the global generators of torch, NumPy and `random` are
    seeded with (seed, network, epoch, position), so that random augmentation in `__getitem__` is
    reproducible and independent of data.workers. Draw from these generators; the state of any other
    one is not restored when a run resumes.

    Args:
        train: training samples; data.train_samples uses the first N of them.
        test: test samples; data.test_samples uses the first N of them.
        val: validation samples. None: data.val_fraction of the training samples are held out, and
            are loaded through `train`, including its augmentation.

    Raises:
        DataError: a dataset is empty or has no __len__ or __getitem__.
    """

    train: MapStyleDataset
    test: MapStyleDataset
    val: MapStyleDataset | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            dataset = getattr(self, field.name)
            if dataset is None and field.name == "val":
                continue
            missing = [
                name for name in ("__len__", "__getitem__") if not hasattr(type(dataset), name)
            ]
            if isinstance(dataset, IterableDataset):
                missing = ["__getitem__"]
            if missing:
                raise DataError(
                    f"Datasets({field.name}=...) must be a map-style dataset: "
                    f"{type(dataset).__name__} has no {' and no '.join(missing)}"
                )
            if not len(dataset):
                raise DataError(
                    f"Datasets({field.name}=...) must not be empty, got a {type(dataset).__name__} "
                    "of length 0"
                )


class DatasetData(BaseData):
    """Batches of user-defined datasets; implements `Data`.

    Args: datasets: what to load from. config: batch size, workers, and sizes of the splits.

    Raises: ConfigError for an option that applies to built-in image datasets only.
    """

    def __init__(
        self,
        datasets: Datasets,
        config: DataConfig,
        *,
        seed: int,
        network: int,
        device: torch.device,
        share: Share = SINGLE,
    ) -> None:
        refuse_image_options(config)
        if datasets.val is not None and config.val_fraction > 0:
            raise ConfigError("data.val_fraction and Datasets(val=...) are mutually exclusive")
        subsets = choose_subsets(
            config, seed=seed, train_total=len(datasets.train), test_total=len(datasets.test)
        )
        if datasets.val is not None:
            subsets = replace(subsets, val=torch.arange(len(datasets.val)))
        super().__init__(config, subsets, seed=seed, network=network, device=device, share=share)
        self._datasets = datasets
        self.workers = worker_count(config.workers or 0)

    def _train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]:
        samples = _Samples(
            self._datasets.train, "train", ("augment", self._seed, self._network, epoch)
        )
        return self._batches(samples, self._local_keys(epoch, first, last))

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Any, Any]]:
        """See `Data.eval_batches`."""
        indices = self._subsets.evaluated(split, self._share)
        # A held-out validation split is loaded through the training dataset.
        name = "train" if split == "val" and self._datasets.val is None else split
        # Seeded by index, so that random samples are the same in every evaluation.
        stream = (f"evaluate {split}", self._seed)
        samples = _Samples(getattr(self._datasets, name), name, stream)
        return self._batches(samples, self._eval_keys(indices))

    def _batches(
        self, samples: _Samples, batches: Iterable[list[SampleKey]]
    ) -> Generator[tuple[Any, Any]]:
        for batch in start_loading(
            samples,
            batches,
            workers=self.workers,
            device=self._device,
            collate=_identity,
        ):
            if isinstance(batch, _Failure):
                raise SampleError(batch.message) from WorkerError(batch.traceback)
            yield map_tensors(lambda tensor: tensor.to(self._device, non_blocking=True), batch)


def refuse_image_options(config: DataConfig) -> None:
    """Raise ConfigError for an option that applies to built-in image datasets only."""
    for name in _IMAGE_OPTIONS:
        if getattr(config, name) != getattr(DataConfig, name):
            raise ConfigError(
                f"data.{name} applies to built-in image datasets only, not to Datasets(...): leave "
                "it unset"
            )


class WorkerError(Exception):
    """Cause of a SampleError that occurred in a loader worker: its traceback as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Failure:
    """What a loader worker returns for a batch that it could not load."""

    message: str
    traceback: str


class _Samples(Dataset[Any]):
    """Loads and collates batches, with a separate seed for each sample.

    Args: name: of the dataset, for error messages. stream: purpose and coordinates of the seed, to
    which the position is added.
    """

    def __init__(self, dataset: Any, name: str, stream: tuple[Any, ...]) -> None:
        self._dataset = dataset
        self._name = name
        self._stream = stream

    def __getitems__(self, keys: list[SampleKey]) -> tuple[Any, Any] | _Failure:
        """The collated (inputs, targets) of a batch; called by the DataLoader instead of [].

        Raises: DataError if a sample cannot be loaded (in a worker it is returned as _Failure).
        """
        context = f"{self._name} dataset"
        try:
            with _preserved_rng():
                samples = []
                for position, index in keys:
                    context = f"{self._name} dataset, index {index}"
                    _seed_rng(stream_seed(*self._stream, position))
                    samples.append(_as_pair(self._dataset[index]))
            context = f"{self._name} dataset, collating a batch"
            inputs, targets = zip(*samples, strict=True)
            return default_collate(list(inputs)), default_collate(list(targets))
        except StoppedError:  # from a signal handler
            raise
        except Exception as error:  # user code may raise anything
            message = " ".join(f"{context}: {type(error).__name__}: {error}".split())
            if get_worker_info() is None:
                raise SampleError(message) from error
            return _Failure(message, "".join(traceback.format_exception(error)))


def _as_pair(sample: Any) -> Any:
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise TypeError(f"a sample must be an (input, target) pair, got {_described(sample)}")
    return sample


def _described(sample: Any) -> str:
    length = f" of length {len(sample)}" if isinstance(sample, (tuple, list)) else ""
    return f"a {type(sample).__name__}{length}"


def _identity(batch: Any) -> Any:
    return batch


@contextmanager
def _preserved_rng() -> Iterator[None]:
    """Restore the global CPU generators of torch, NumPy and `random` on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _seed_rng(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
