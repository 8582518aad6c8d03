"""Reads one image file, whatever its mode, and says why when there is no image in it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Unreadable:
    """A file that gave no image.

    It is returned and not raised, for a loader worker would wrap an error into its traceback.
    """

    path: str
    reason: str
    """One line."""
    broken: bool
    """Whether the content is at fault; False: the system does not give the file."""


def read_image(path: str) -> Image.Image | Unreadable:
    """The image in RGB, transparency dropped, not turned by its EXIF orientation."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Unreadable(path, error.strerror or str(error), broken=False)
    if not content:
        return Unreadable(path, "it is empty", broken=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparency and metadata, which are not wanted
            with Image.open(io.BytesIO(content)) as image:
                return _as_rgb(image)
    except UnidentifiedImageError:
        return Unreadable(path, "it is no image of a known format", broken=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Unreadable(path, " ".join(str(error).split()), broken=True)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its pixels have 32 bits, of which the range is unknown")
    if image.mode.startswith("I"):  # 16 bits, which convert would clip; the high byte, as of RGB
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
