"""Options of the datasets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import at_least, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets and data loading."""

    name: str = "fashion-mini"
    """fashion-mini (ships with the package), fashion-mnist, cifar10, cifar100, imagefolder, or
    package.module:name of a function (root) -> images and labels."""
    root: str = "data"
    """Folder of the datasets; for imagefolder, the folder with train/ and val/."""
    batch_size: int = 128
    """Samples per optimizer step of each network."""
    train_samples: int | None = None
    """Use the first N training samples only, including the validation split."""
    test_samples: int | None = None
    """Use the first N test samples only."""
    val_fraction: float = 0.0
    """Fraction of the training samples held out for validation, in [0, 1)."""
    image_size: int | None = None
    """Image size in pixels: small images are padded to it, imagefolder crops to it (default
    224)."""
    channels: int | None = None
    """Convert images to 1 (grayscale) or 3 channels; unset: as in the dataset."""
    augment: bool = True
    """Random crops and horizontal flips during training."""
    workers: int | Literal["auto"] | None = None
    """DataLoader workers per process; 0: load in the training process; auto: one for each core of
    the process but one, between 1 and 16. Unset: auto for imagefolder, 0 for datasets passed in
    Python."""
    skip_broken: bool = False
    """Skip images that cannot be decoded and report their number (imagefolder only)."""
    download: bool = True
    """Download CIFAR if it is missing, once per machine."""

    def __post_init__(self) -> None:
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.train_samples", self.train_samples, 1)
        at_least("data.test_samples", self.test_samples, 1)
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        at_least("data.image_size", self.image_size, 1)
        require(self.channels in (None, 1, 3), "data.channels", self.channels, "1 or 3")
        if self.workers != "auto":
            at_least("data.workers", self.workers, 0)
