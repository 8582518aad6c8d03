"""Small datasets, and comparing lists of batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_graft.config import DataConfig
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.order import SINGLE, Share
from dist_graft.training.data.sources import DatasetInfo, ImageSet

Batch = tuple[Tensor, Tensor]


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    """Whether two lists of batches are bitwise equal."""
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def targets(batches: Iterable[Batch]) -> list[int]:
    """All targets in order."""
    return torch.cat([batch[1] for batch in batches]).tolist()


def numbered(count: int, channels: int, side: int, first: int = 0) -> ImageSet:
    """Random images labeled first, first + 1, ..."""
    rng = np.random.default_rng(first)
    images = rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    return ImageSet(images, np.arange(first, first + count))


class Noisy(Dataset[Any]):
    """A sample is its index plus noise from the three global generators, and its index."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        noise = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])
        return self.first + index + noise, self.first + index


def make_resident(
    *,
    seed: int = 0,
    network: int = 0,
    native_channels: int = 3,
    channels_last: bool = False,
    mean: float = 0.0,
    std: float = 1 / 255,
    share: Share = SINGLE,
    **options: object,
) -> ResidentImages:
    """30 training images labeled 0 … 29 and 11 test images labeled 100 … 110, of 12 pixels."""
    info = DatasetInfo(
        num_classes=200,
        mean=(mean,) * native_channels,
        std=(std,) * native_channels,
    )
    return ResidentImages(
        numbered(30, native_channels, 12),
        numbered(11, native_channels, 12, first=100),
        info,
        DataConfig(**{"batch_size": 8, **options}),  # type: ignore[arg-type]
        seed=seed,
        network=network,
        device=torch.device("cpu"),
        channels_last=channels_last,
        share=share,
    )
