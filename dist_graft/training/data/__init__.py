"""Datasets: the batches of every epoch, as a pure function of the seed.

Importing this package imports neither torch nor torchvision, so that an unknown name is reported
immediately.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from dist_graft.errors import ConfigError
from dist_graft.references import is_reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_graft.config import DataConfig
    from dist_graft.training.data.order import Part
    from dist_graft.training.data.preprocessing import Preprocessing

__all__ = [
    "Data",
    "ImageData",
    "check_dataset_name",
    "dataset_names",
    "ensure_available",
    "load_data",
]

DATASETS = ("fashion-mini", "fashion-mnist", "cifar10", "cifar100", "imagefolder")


class Data(Protocol):
    """Batches of a dataset for one network, or for one of the processes that train it."""

    train_size: int
    """Training samples, without the validation split."""
    steps_per_epoch: int
    """Training batches per epoch; the last one may be smaller."""
    has_validation: bool
    workers: int
    """Loader workers of this process; 0: it loads the samples itself."""

    def part(self, step: int) -> Part:
        """Part of a step's batch that this process trains on."""
        ...

    def train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Any, Any]]:
        """Batches of steps first … last - 1 of an epoch, shuffled and augmented.

        If several processes train the network, each gets its part of every batch. Order and
        augmentation depend on the seed, the network, the epoch and the position in the epoch only:
        neither `first` nor the number of processes changes a sample.

        Call it once per epoch, because it starts the loader workers. `close()` of the iterator
        stops them early.

        Returns: (inputs, targets) pairs on the device.
        Raises: ValueError unless 0 ≤ first ≤ last ≤ steps_per_epoch; DataError if a sample cannot
        be loaded.
        """
        ...

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Any, Any]]:
        """All samples of a split in a fixed order; pairs as in training.

        If several processes train the network, each gets a contiguous range of the split.

        Raises: ConfigError if there is no validation split, or the split has fewer samples than the
        network has processes; DataError if a sample cannot be loaded.
        """
        ...


@runtime_checkable
class ImageData(Data, Protocol):
    """Batches for image classification.

    Inputs are normalized images, float32 [batch, channels, image_size, image_size]; targets are
    classes, int64 [batch]. Of mixed images (data.mixup, data.cutmix) training targets are
    probabilities, float32 [batch, num_classes]. With data.skip_broken, broken images are missing
    from their batch: a training batch may be empty, an evaluation batch is never empty.
    """

    num_classes: int
    channels: int
    """1 or 3."""
    image_size: int
    """Height and width in pixels."""
    classes: list[str]
    """Name of each class; its number where the dataset has no names."""
    preprocessing: Preprocessing
    """How test images are prepared."""
    skipped: dict[str, str]
    """Reason by path, for each broken image skipped so far."""

    def train_batches(self, epoch: int, first: int, last: int) -> Generator[tuple[Tensor, Tensor]]:
        """See `Data.train_batches`."""
        ...

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data.eval_batches`."""
        ...


def dataset_names() -> list[str]:
    """Built-in values of data.name; the first one ships with the package."""
    return list(DATASETS)


def check_dataset_name(name: str) -> None:
    """Raise ConfigError with similar and legal names if no dataset has this name.

    A "package.module:name" passes; it is imported later.
    """
    if name in DATASETS or is_reference(name):
        return
    near = difflib.get_close_matches(name, DATASETS, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(f"data.name must be one of {', '.join(DATASETS)}, got {name!r}{hint}")


def ensure_available(config: DataConfig) -> None:
    """Download the dataset if it is missing and can be downloaded.

    Call this in one process per machine while the others wait. Processes on machines that share
    data.root, and jobs, download one after the other.

    Raises: ConfigError for an unknown name; DataError if the dataset is missing and data.download
    is false, or if the download fails.
    """
    check_dataset_name(config.name)
    if config.name in ("cifar10", "cifar100"):
        from dist_graft.training.data.sources import ensure_cifar

        ensure_cifar(config.name, config.root, download=config.download)


def load_data(
    config: DataConfig,
    *,
    seed: int,
    network: int,
    device: torch.device,
    channels_last: bool,
    replica: int = 0,
    replicas: int = 1,
) -> ImageData:
    """Open the image dataset that the configuration names.

    Args: seed: of the run. network: index of the network, which determines order and augmentation.
    channels_last: memory format of the images. replica: index of this process among the `replicas`
    processes that train the network; each gets its part of every batch.
    Raises: ConfigError for an unknown name, an image size below the dataset's, or an empty split;
    DataError if the dataset is missing or damaged.
    """
    check_dataset_name(config.name)
    from dist_graft.training.data.order import Share

    share = Share(replica, replicas)
    if config.name == "imagefolder":
        from dist_graft.training.data.folder import FolderImages

        return FolderImages(
            config,
            seed=seed,
            network=network,
            device=device,
            channels_last=channels_last,
            share=share,
        )
    from dist_graft.training.data.images import ResidentImages
    from dist_graft.training.data.sources import read_small

    train, test, info = read_small(config.name, config.root)
    return ResidentImages(
        train,
        test,
        info,
        config,
        seed=seed,
        network=network,
        device=device,
        channels_last=channels_last,
        share=share,
    )
