"""Data sets: what a network sees in each step of each epoch, as a pure function of the seed.

Importing this package imports neither torch nor torchvision: an unknown name is found early.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from dist_graft.training.data.names import check_dataset_name, dataset_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_graft.config import DataConfig
    from dist_graft.training.data.order import Part

__all__ = ["Data", "check_dataset_name", "dataset_names", "ensure_available", "load_data"]


class Data(Protocol):
    """One network's view of a data set, or that of one of the processes that train it."""

    num_classes: int
    channels: int
    """1 or 3, as the batches have them."""
    image_size: int
    """Height and width of the batches' images, in pixels."""
    train_size: int
    """Training images, those kept for validation not counted."""
    steps_per_epoch: int
    """Training batches in an epoch; the last one may be smaller."""
    has_validation: bool
    skipped: dict[str, str]
    """Paths of the broken images that were left out so far, each with the reason, in the order in
    which they were met; empty unless data.skip_broken."""

    def part(self, step: int) -> Part:
        """What this process trains on of a step's batch."""
        ...

    def train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the steps first … last − 1 of an epoch, shuffled and augmented.

        Where several processes train the network, this one's part of each. Order, crops and flips
        belong to a position in the network's epoch: the number of processes does not change them.

        They are the same whether the epoch is walked through at once or in parts. A broken image
        that is left out (data.skip_broken) is missing from its batch, which may become empty, and
        changes nothing else.

        Returns: pairs of normalised images (float32 [batch, channels, size, size]) and labels
        (int64 [batch]), both on the device.
        Raises: ValueError when not 0 ≤ first ≤ last ≤ steps_per_epoch; DataError naming the file
        when an image cannot be read and is not to be left out, or all were left out.
        """
        ...

    def eval_batches(self, split: Literal["test", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in a fixed order, not augmented; pairs as in training.

        Images that are left out are missing, and no batch is empty. Where several processes train
        the network, this one's stretch of the split.

        Raises: ConfigError when "val" is asked for and no images are kept for validation, or a
        split has fewer images than the network has processes;
        DataError as in training.
        """
        ...


def ensure_available(config: DataConfig) -> None:
    """Download the data set when it can be downloaded and is missing; otherwise do nothing.

    To be called by one process of a machine while the others wait.

    Raises: ConfigError for an unknown name; DataError when the data set is missing and
    data.download is off, or the download fails.
    """
    check_dataset_name(config.name)
    if config.name in ("cifar10", "cifar100"):
        from dist_graft.training.data.sources import open_cifar

        open_cifar(config.name, config.root, train=True, download=config.download)


def load_data(
    config: DataConfig,
    *,
    seed: int,
    network: int,
    device: torch.device,
    channels_last: bool,
    replica: int = 0,
    replicas: int = 1,
) -> Data:
    """Open the data set for one network.

    Args: seed: of the whole run; network: index of the network, which has an order and
    augmentation of its own. channels_last: memory format of the batches' images. replica: of the
    `replicas` processes that train the network, each on its part of every batch.
    Raises: ConfigError for an unknown name, an image size below the data set's or a validation
    split that leaves nothing; DataError when the data is missing or damaged.
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

    train, test, facts = read_small(config.name, config.root)
    return ResidentImages(
        train,
        test,
        facts,
        config,
        seed=seed,
        network=network,
        device=device,
        channels_last=channels_last,
        share=share,
    )
