"""Random crops and flips, one draw a sample, and normalisation, on whatever device images are on.

torchvision's v2 transforms draw once for a whole batch, so batches are cropped by indexing here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dist_graft.training.data.order import generator

CROP_MARGIN = 4
"""Black pixels around an image that a random crop may reach into."""


def epoch_draws(size: int, *, seed: int, network: int, epoch: int) -> Tensor:
    """Where each position of an epoch is cropped and whether it is flipped.

    Returns: int64 [size, 3]: top and left in [0, 2 · CROP_MARGIN], flip 0 or 1.
    """
    stream = generator("augment", seed, network, epoch)
    corners = torch.randint(0, 2 * CROP_MARGIN + 1, (size, 2), generator=stream)
    flips = torch.randint(0, 2, (size, 1), generator=stream)
    return torch.cat([corners, flips], dim=1)


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centre square images ([…, side, side]) on black of size × size pixels, size ≥ side."""
    missing = size - images.shape[-1]
    if missing == 0:
        return images
    before, after = missing // 2, missing - missing // 2
    return functional.pad(images, (before, after, before, after))


def crop_and_flip(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Pad to size, add a black margin, and cut a size × size window out of each image.

    Args: images: uint8 [batch, channels, side, side], side ≤ size; draws: int64 [batch, 3], rows
    of epoch_draws on the images' device.
    Returns: uint8 [batch, channels, size, size]; mirrored left to right where the draw says so.
    """
    batch, channels = images.shape[:2]
    width = size + 2 * CROP_MARGIN
    padded = pad_to(images, width)
    top, left, flip = draws[:, :, None].unbind(dim=1)
    pixels = torch.arange(size, device=images.device)
    rows = top + pixels
    columns = left + torch.where(flip > 0, size - 1 - pixels, pixels)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
    return (
        padded.reshape(batch, channels, -1)
        .gather(2, places.expand(-1, channels, -1))
        .view(batch, channels, size, size)
    )


class Normalise:
    """uint8 images to float32 ones with the data set's mean 0 and deviation 1 a channel."""

    def __init__(
        self,
        mean: tuple[float, ...],
        deviation: tuple[float, ...],
        *,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        """mean, deviation: a channel each, of pixels in [0, 1]."""
        centre = torch.tensor(mean, dtype=torch.float64)
        spread = torch.tensor(deviation, dtype=torch.float64)
        self._scale = (1 / (255 * spread)).float().view(1, -1, 1, 1).to(device)
        self._shift = (-centre / spread).float().view(1, -1, 1, 1).to(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width], uint8 to float32 in the memory format asked for."""
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self._scale).add_(self._shift).contiguous(memory_format=self._format)
