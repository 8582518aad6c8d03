"""Per-sample random crops and flips, and normalization, on the device of the images.

torchvision's v2 transforms draw once per batch, so crops are implemented here by indexing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dist_graft.training.data.order import generator

CROP_MARGIN = 4
"""Pixels of black padding on each side before a random crop."""


def epoch_draws(size: int, *, seed: int, network: int, epoch: int) -> Tensor:
    """Crop offsets and flips for every position of an epoch.

    Returns: int64 [size, 3]: top and left in [0, 2 · CROP_MARGIN], flip 0 or 1.
    """
    stream = generator("augment", seed, network, epoch)
    corners = torch.randint(0, 2 * CROP_MARGIN + 1, (size, 2), generator=stream)
    flips = torch.randint(0, 2, (size, 1), generator=stream)
    return torch.cat([corners, flips], dim=1)


def pad_to(images: Tensor, size: int) -> Tensor:
    """Pad square images [..., side, side] with black to size × size, centered; size ≥ side."""
    missing = size - images.shape[-1]
    if missing == 0:
        return images
    before, after = missing // 2, missing - missing // 2
    return functional.pad(images, (before, after, before, after))


def crop_and_flip(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Pad images to size plus a margin, crop a window from each, and flip it horizontally.

    Args: images: uint8 [batch, channels, side, side], side ≤ size. draws: int64 [batch, 3], rows
    of `epoch_draws` on the images' device.
    Returns: uint8 [batch, channels, size, size].
    """
    batch, channels = images.shape[:2]
    width = size + 2 * CROP_MARGIN
    padded = pad_to(images, width)
    top, left, flip = draws[:, :, None].unbind(dim=1)
    pixels = torch.arange(size, device=images.device)
    rows = top + pixels
    columns = left + torch.where(flip > 0, size - 1 - pixels, pixels)
    flat_indices = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
    return (
        padded.reshape(batch, channels, -1)
        .gather(2, flat_indices.expand(-1, channels, -1))
        .view(batch, channels, size, size)
    )


class Normalize:
    """Convert uint8 images to float32 and normalize each channel with (x / 255 - mean) / std.

    Args: mean, std: one value per channel, for pixels in [0, 1]. channels_last: memory format of
    the result.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        center = torch.tensor(mean, dtype=torch.float64)
        scale = torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * scale)).float().view(1, -1, 1, 1).to(device)
        self._shift = (-center / scale).float().view(1, -1, 1, 1).to(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 [batch, channels, height, width]."""
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self._scale).add_(self._shift).contiguous(memory_format=self._format)
