"""How an image becomes the input of a network, for use outside of training.

torchvision and PIL are imported on first use: training on small images needs neither (ADR 18).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_graft.errors import DataError
from dist_graft.training.data.augment import Normalize, pad_to

if TYPE_CHECKING:
    from PIL.Image import Image

DAMAGED = (KeyError, TypeError, ValueError, OverflowError)
"""Errors of `Preprocessing.from_json`."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop and normalize an image, as the test images of the run."""

    channels: int
    """1 (grayscale) or 3."""
    resize: int
    """Length of the shorter edge after resizing, in pixels."""
    crop: int
    """Height and width of the central crop."""
    image_size: int
    """Height and width of the input; a smaller crop is padded with black."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Restore `dataclasses.asdict` after JSON.

        Raises: one of `DAMAGED` if the values are not such a description.
        """
        sizes = {name: int(values[name]) for name in ("channels", "resize", "crop", "image_size")}
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        return cls(**sizes, mean=mean, std=std)

    def __call__(self, image: str | Path | Image | Tensor) -> Tensor:
        """Prepare one image.

        Args: image: path of a file, PIL image, or uint8 tensor [1 or 3, height, width].
        Returns: float32 [channels, image_size, image_size].
        Raises: DataError if the file cannot be read as an image.
        """
        from dist_graft.training.data.decoding import CenterCrop, Unreadable, read_image, to_pixels

        transform = CenterCrop(self.crop, self.channels, resize=self.resize)
        if isinstance(image, (str, Path)):
            pixels = read_image(Path(image), transform)
            if isinstance(pixels, Unreadable):
                raise DataError(f"{pixels.path} cannot be read as an image: {pixels.reason}")
        elif not isinstance(image, Tensor):
            pixels = transform.crop(to_pixels(image))
        else:
            if image.dtype != torch.uint8 or image.dim() != 3 or len(image) not in (1, 3):
                raise DataError(
                    "an image must be uint8 [1 or 3, height, width], got "
                    f"{image.dtype} {list(image.shape)}"
                )
            pixels = transform.crop(image.expand(3, -1, -1))
        normalize = Normalize(self.mean, self.std, device=torch.device("cpu"), channels_last=False)
        return normalize(pad_to(pixels, self.image_size)[None])[0]
