from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sample_data import numbered

from dist_graft.config import DataConfig
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.order import SINGLE, Share
from dist_graft.training.data.sources import DatasetInfo

MakeResident = Callable[..., ResidentImages]


@pytest.fixture
def make_resident() -> MakeResident:
    """30 training images labeled 0 … 29 and 11 test images labeled 100 … 110, of 12 pixels."""

    def make(
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

    return make


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """train/ and val/ with the classes cat (7 and 3 images), dog (4 and 2) and eel (1 and 1)."""
    random = np.random.default_rng(0)
    for split, counts in (("train", (7, 4, 1)), ("val", (3, 2, 1))):
        for name, count in zip(("cat", "dog", "eel"), counts, strict=True):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels: NDArray[np.uint8] = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path
