"""Per-sample random crops, flips and RandAugment, and normalization, on the images' device.

torchvision's v2 transforms draw once per batch, so crops are implemented here by indexing.
RandAugment is torchvision's, image by image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dist_graft.config import DataConfig
from dist_graft.config.data import rand_augment_parameters
from dist_graft.seeding import stream_seed
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


class RandAugment:
    """torchvision's RandAugment, which draws from torch's default generator.

    Args: operations: number of operations per image. magnitude: of all of them, in 0 to 30.
    """

    def __init__(self, operations: int, magnitude: int) -> None:
        from torchvision.transforms import v2  # small images do not need torchvision otherwise

        self._transform = v2.RandAugment(operations, magnitude)

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image, uint8 [channels, size, size]."""
        transformed: Tensor = self._transform(image)
        return transformed

    def each(self, images: Tensor, first: int, *, seed: int, network: int, epoch: int) -> Tensor:
        """Transform images at positions first, first + 1, ... of an epoch, each with its own seed.

        Args: images: uint8 [batch, channels, size, size].
        """
        transformed = []
        with torch.random.fork_rng(devices=[]):
            for position, image in enumerate(images, first):
                draw = stream_seed("rand_augment", seed, network, epoch, position)
                torch.default_generator.manual_seed(draw)
                transformed.append(self(image))
        return torch.stack(transformed)


def rand_augment(config: DataConfig) -> RandAugment | None:
    """RandAugment as data.rand_augment says; None without it."""
    option = config.rand_augment
    return None if option is None else RandAugment(*rand_augment_parameters(option))


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
