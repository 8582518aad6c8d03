"""Random erasing, Mixup, and CutMix: per-image draws for a batch, on its device.

torchvision's v2 transforms draw once per batch, so these are implemented here by masks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from dist_graft.config import DataConfig
from dist_graft.seeding import stream_seed

_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
_ATTEMPTS = 10
"""Range of the erased share of the image and of its aspect ratio, and attempts to fit such a box
into the image: as in torchvision's RandomErasing."""

Boxes = NDArray[np.int64]
"""[n, 4]: top, bottom, left, and right edge; the last row and column are excluded."""


class BatchAugment:
    """Erases boxes of the images of a training batch, then mixes pairs of images and their labels.

    All draws of a step are a function of the stream (seed, network, epoch, step) only. Images are
    mixed with their neighbor: positions 2i and 2i + 1 of the shuffled batch are a pair.

    Args:
        config: data.random_erasing, data.mixup, and data.cutmix.
        num_classes: classes of the labels.
    """

    def __init__(self, config: DataConfig, num_classes: int) -> None:
        self._config = config
        self._num_classes = num_classes

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        stream: tuple[int, int, int, int],
        positions: slice,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """Augment a part of a batch; the images are changed in place.

        Args:
            images: normalized, [n, channels, side, side].
            labels: classes, int64 [n].
            stream: seed, network, epoch, and step.
            positions: of the images in the batch; starts at an even position if images are mixed.
            size: of the whole batch.

        Returns: the images, and their labels or, if images are mixed, the probabilities of the
            classes, float32 [n, num_classes].
        """
        config, side = self._config, images.shape[-1]
        rows = slice(positions.start, positions.start + len(images))
        if config.random_erasing > 0:
            generator = _generator("erase", stream)
            boxes = draw_erased(size, side, config.random_erasing, generator)
            images.masked_fill_(_inside(boxes[rows], images), 0.0)
        if not config.mixes:
            return images, labels
        generator = _generator("mix", stream)
        boxes, shares = draw_mixed(size, side, config.mixup, config.cutmix, generator)
        share = torch.from_numpy(shares[rows]).to(images.device, torch.float32)
        cut = torch.from_numpy(boxes[rows, 0] < boxes[rows, 1]).to(images.device)
        share_of_pixel = torch.where(
            cut.view(-1, 1, 1, 1), _inside(boxes[rows], images).float(), share.view(-1, 1, 1, 1)
        )
        partner = torch.arange(len(images), device=images.device) ^ 1
        partner = torch.where(partner < len(images), partner, partner - 1)  # the last of an odd n
        images.lerp_(images[partner], share_of_pixel)
        probabilities = F.one_hot(labels, self._num_classes).float()
        return images, probabilities.lerp(probabilities[partner], share.view(-1, 1))


def draw_erased(size: int, side: int, probability: float, generator: np.random.Generator) -> Boxes:
    """Box of each image to erase, empty for an image that is left as it is."""
    area = side**2 * generator.uniform(*_ERASED_AREA, (size, _ATTEMPTS))
    low, high = map(math.log, _ERASED_RATIO)
    ratio = np.exp(generator.uniform(low, high, (size, _ATTEMPTS)))
    attempts = np.rint(np.sqrt([area * ratio, area / ratio])).astype(np.int64)
    fits = np.all(attempts < side, axis=0)
    edges = attempts[:, np.arange(size), fits.argmax(axis=1)]
    edges *= np.any(fits, axis=1) & (generator.random(size) < probability)
    starts = (generator.random((2, size)) * (side - edges + 1)).astype(np.int64)
    return _boxes(starts, starts + edges)


def draw_mixed(
    size: int, side: int, mixup: float, cutmix: float, generator: np.random.Generator
) -> tuple[Boxes, NDArray[np.float64]]:
    """Box that each image takes from its partner, empty with Mixup, and the partner's share.

    Args:
        size: of the batch.
        side: height and width of the images.
        mixup: parameter of Mixup's beta distribution; 0: CutMix only.
        cutmix: parameter of CutMix's beta distribution; 0: Mixup only. With both, each image draws
            one of them.
        generator: source of all draws.
    """
    cuts = generator.random(size) < (0.5 if mixup and cutmix else float(cutmix > 0))
    averaged = generator.beta(mixup or 1.0, mixup or 1.0, size)
    half = (side * np.sqrt(1 - generator.beta(cutmix or 1.0, cutmix or 1.0, size)) / 2).astype(int)
    centers = generator.integers(0, side, (2, size))
    edges = np.where(cuts, [np.maximum(centers - half, 0), np.minimum(centers + half, side)], 0)
    boxes = _boxes(edges[0], edges[1])
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / side**2
    return boxes, np.where(cuts, area, 1 - averaged)


def _generator(purpose: str, stream: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng(stream_seed(purpose, *stream))


def _boxes(starts: NDArray[Any], ends: NDArray[Any]) -> Boxes:
    """Boxes from their first and last edges, [2, n]: vertical, horizontal."""
    return np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1)


def _inside(boxes: Boxes, images: Tensor) -> Tensor:
    """Which pixels are inside their image's box: bool [n, 1, side, side]."""
    edges = torch.from_numpy(boxes).to(images.device).view(-1, 4, 1)
    top, bottom, left, right = edges.unbind(dim=1)
    pixels = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (pixels >= top) & (pixels < bottom), (pixels >= left) & (pixels < right)
    return (rows[:, None, :, None]) & (columns[:, None, None, :])
