"""Options of the data."""

from __future__ import annotations

from dataclasses import dataclass

from dist_graft.config.validation import at_least, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the networks are trained and tested on."""

    name: str = "fashion-mini"
    """fashion-mini (shipped), fashion-mnist, cifar10, cifar100 or imagefolder; or
    package.module:name of a function (root) -> images and labels (docs/extending.md)."""
    root: str = "data"
    """Folder that holds the data sets; for imagefolder the one with train/ and val/ in it."""
    batch_size: int = 128
    """Images a network sees in one optimizer step."""
    train_samples: int | None = None
    """Use the first N training images only (before a validation split is taken)."""
    test_samples: int | None = None
    """Use the first N test images only."""
    val_fraction: float = 0.0
    """Share of the training images that is kept for validation, in [0, 1)."""
    image_size: int | None = None
    """Pixels: small images are padded with black to this size; imagefolder crops to it (224)."""
    channels: int | None = None
    """1 (grey) or 3; unset: as the data set has them."""
    augment: bool = True
    """Random crops and flips while training, the usual ones of the data set."""
    workers: int = 4
    """Processes that decode images for each network (imagefolder only)."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded, and count them (imagefolder only)."""
    download: bool = True
    """Download CIFAR when it is missing, once on every machine."""

    def __post_init__(self) -> None:
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.train_samples", self.train_samples, 1)
        at_least("data.test_samples", self.test_samples, 1)
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        at_least("data.image_size", self.image_size, 1)
        require(self.channels in (None, 1, 3), "data.channels", self.channels, "1 or 3")
        at_least("data.workers", self.workers, 0)
