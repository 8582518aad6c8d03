from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


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
