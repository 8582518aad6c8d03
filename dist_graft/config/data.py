"""Options of the datasets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_graft.config.validation import at_least, check_kwargs, known_or_own, require
from dist_graft.errors import ConfigError


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
    mixup: float = 0.0
    """Mixup (arXiv 1710.09412): training images and their labels are averaged in pairs, with
    weights from Beta(mixup, mixup). 0: off. With cutmix, one of the two is drawn for each image."""
    cutmix: float = 0.0
    """CutMix (arXiv 1905.04899): a box of each training image is copied from another image, whose
    label gets the box's share of the area; 1 minus this share is drawn from Beta(cutmix, cutmix).
    0: off."""
    random_erasing: float = 0.0
    """Random erasing (arXiv 1708.04896): probability, in [0, 1], that a box of a training image is
    filled with the mean color."""
    rand_augment: int | str | None = None
    """RandAugment (arXiv 1909.13719) of training images: magnitude, from 0 to 30, of two operations
    per image, or "N,M" for N operations of magnitude M; unset: off."""
    transform: str | None = None
    """package.module:name of a function (images, generator) -> images, the last step of
    augmentation: it gets each batch of training images, normalized, on the device. It must draw
    random numbers from torch.Generator or torch's global ones."""
    transform_kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of data.transform, as a YAML mapping."""
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
        at_least("data.mixup", self.mixup, 0)
        at_least("data.cutmix", self.cutmix, 0)
        erasing = self.random_erasing
        require(0 <= erasing <= 1, "data.random_erasing", erasing, "in [0, 1]")
        if self.rand_augment is not None:
            rand_augment_parameters(self.rand_augment)
        if self.transform is not None:
            known_or_own("data.transform", self.transform, ())
        elif self.transform_kwargs:
            raise ConfigError("data.transform_kwargs requires data.transform")
        check_kwargs("data.transform_kwargs", self.transform_kwargs, {"generator": "the run"})
        if self.workers != "auto":
            at_least("data.workers", self.workers, 0)

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed, and their targets are probabilities."""
        return self.mixup > 0 or self.cutmix > 0


def rand_augment_parameters(value: int | str) -> tuple[int, int]:
    """Number of operations and magnitude of RandAugment, from data.rand_augment.

    Raises: ConfigError naming the option.
    """
    text = str(value)
    parts = text.split(",") if "," in text else ["2", text]
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    legal = len(numbers) == len(parts) == 2 and numbers[0] >= 1 and numbers[1] <= 30
    require(legal, "data.rand_augment", value, "M or N,M with N at least 1 and M in 0 to 30")
    return numbers[0], numbers[1]
