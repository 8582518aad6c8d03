"""Decoding and cropping of image files.

JPEG files are decoded by torchvision, which is faster than PIL and gives the same pixels. PIL reads
the headers, all other files, and those that torchvision rejects. torchvision has announced to
remove its decoder; without it, PIL decodes everything, to the same pixels.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812

from dist_graft.training.data.images import grayscale

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

Transform = Callable[[Image.Image, bytes], Tensor]
"""Decodes an opened file, given its content, to uint8 [channels, size, size]."""


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded.

    Returned rather than raised, because a loader worker wraps exceptions into its traceback.
    """

    path: str
    """Bytes that are not UTF-8 are shown as escapes."""
    reason: str
    """One line."""
    broken: bool
    """True if the content is damaged, False if the system cannot read the file."""


def read_image(path: Path, transform: Transform) -> Tensor | Unreadable:
    """Read and transform an image file."""

    def unreadable(reason: str, *, broken: bool = True) -> Unreadable:
        return Unreadable(display_path(path), " ".join(reason.split()), broken=broken)

    try:
        content = path.read_bytes()
    except OSError as error:
        return unreadable(error.strerror or str(error), broken=False)
    if not content:
        return unreadable("file is empty")
    try:
        with warnings.catch_warnings():
            # about transparency and metadata, which are not used, and torchvision's plans
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                return transform(image, content)
    except UnidentifiedImageError:
        return unreadable("unknown image format")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return unreadable(str(error))


def display_path(path: Path) -> str:
    """Path for a message; bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def decode(image: Image.Image, content: bytes) -> Tensor:
    """Decode an image to RGB. Transparency is dropped and the EXIF orientation ignored.

    Args: image: the opened file; its pixels are not loaded yet. content: of the file.
    Returns: uint8 [3, height, width].
    """
    pixels: Tensor | None = None
    if decode_jpeg is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
        with suppress(RuntimeError):  # damaged: PIL decodes it nevertheless, or says what is wrong
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_jpeg(buffer, mode=ImageReadMode.RGB)
    return to_pixels(image) if pixels is None else pixels


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to RGB, uint8 [3, height, width]."""
    pixels: Tensor = F.pil_to_tensor(_as_rgb(image))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32-bit pixels of unknown range are not supported")
    if image.mode.startswith("I"):  # 16 bits: keep the high byte, convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


class RandomCrop:
    """Random crop of 8% to 100% of an image, resized to size × size, and flipped half the time.

    Draws from torch's default generator: the crop as `v2.RandomResizedCrop` does, then the flip. A
    large JPEG image whose crop is at least twice as large as the result is decoded at 1/2, 1/4 or
    1/8 of its size.
    """

    def __init__(self, size: int, channels: int) -> None:
        self._size, self._channels = size, channels
        self._crop = v2.RandomResizedCrop(size)

    def __call__(self, image: Image.Image, content: bytes) -> Tensor:
        """See `Transform`."""
        crop = self._crop.make_params([image])
        flip = torch.rand(1) < 0.5
        reduction = min(crop["height"], crop["width"]) // self._size
        # Below 16 times the pixels of the result, decoding all of them is faster.
        is_large = image.width * image.height >= 16 * self._size**2
        if reduction > 1 and is_large and image.format == "JPEG":
            pixels = self._reduced(image, reduction, **crop)
        else:
            pixels = F.resized_crop(decode(image, content), **crop, size=[self._size, self._size])
        return _as_channels(pixels.flip(-1) if flip else pixels, self._channels)

    def _reduced(
        self, image: Image.Image, reduction: int, *, top: int, left: int, height: int, width: int
    ) -> Tensor:
        """Decode at no less than 1/reduction of the size, and crop between pixels."""
        full_width = image.width
        image.draft(None, (full_width // reduction, image.height // reduction))
        factor = round(full_width / image.width)
        box = left / factor, top / factor, (left + width) / factor, (top + height) / factor
        size = self._size, self._size
        resized = _as_rgb(image).resize(size, Image.Resampling.BILINEAR, box=box)
        pixels: Tensor = F.pil_to_tensor(resized)
        return pixels


class CenterCrop:
    """Central size × size pixels of an image whose shorter edge is resized, by default to 8/7."""

    def __init__(self, size: int, channels: int, *, resize: int | None = None) -> None:
        self._size, self._channels = size, channels
        self.resize = resize or round(size * 256 / 224)

    def __call__(self, image: Image.Image, content: bytes) -> Tensor:
        """See `Transform`."""
        return self.crop(decode(image, content))

    def crop(self, pixels: Tensor) -> Tensor:
        """Resize and crop uint8 [3, height, width]."""
        pixels = F.resize(pixels, [self.resize])
        return _as_channels(F.center_crop(pixels, [self._size, self._size]), self._channels)


def _as_channels(pixels: Tensor, channels: int) -> Tensor:
    return grayscale(pixels[None])[0] if channels == 1 else pixels
