"""Decode image files of any mode to RGB; an unreadable file yields the reason."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded.

    Returned rather than raised, because a loader worker wraps exceptions into its traceback.
    """

    path: str
    reason: str
    """One line."""
    broken: bool
    """True if the content is damaged, False if the system cannot read the file."""


def read_image(path: str) -> Image.Image | Unreadable:
    """Decode a file to RGB. Transparency is dropped and the EXIF orientation ignored."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Unreadable(path, error.strerror or str(error), broken=False)
    if not content:
        return Unreadable(path, "file is empty", broken=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transparency and metadata, which are not used
            with Image.open(io.BytesIO(content)) as image:
                return _as_rgb(image)
    except UnidentifiedImageError:
        return Unreadable(path, "unknown image format", broken=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Unreadable(path, " ".join(str(error).split()), broken=True)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32-bit pixels of unknown range are not supported")
    if image.mode.startswith("I"):  # 16 bits: keep the high byte, convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
