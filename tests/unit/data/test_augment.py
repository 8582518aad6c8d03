from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_graft.training.data.augment import (
    CROP_MARGIN,
    Normalize,
    crop_and_flip,
    epoch_draws,
    pad_to,
)


def reference(image, draw, size):
    """One image (channels, side, side), by hand."""
    channels, side = image.shape[:2]
    top, left, flip = draw
    width = size + 2 * CROP_MARGIN
    canvas = np.zeros((channels, width, width), np.uint8)
    corner = (width - side) // 2
    canvas[:, corner : corner + side, corner : corner + side] = image
    window = canvas[:, top : top + size, left : left + size]
    return window[:, :, ::-1] if flip else window


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    side=st.integers(1, 9),
    extra=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_crop_and_flip_equals_the_reference(batch, channels, side, extra, seed):
    size = side + extra
    shape = (batch, channels, side, side)
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    draws = epoch_draws(batch, seed=seed, network=0, epoch=0)
    cut = crop_and_flip(images, draws, size)
    assert cut.dtype == torch.uint8
    for image, draw, result in zip(images, draws.tolist(), cut, strict=True):
        np.testing.assert_array_equal(result.numpy(), reference(image.numpy(), draw, size))


def test_expanded_grayscale_images_are_cropped_alike_in_all_channels():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    draws = epoch_draws(5, seed=3, network=0, epoch=0)
    rgb = crop_and_flip(images.expand(-1, 3, -1, -1), draws, 10)
    assert torch.equal(rgb, crop_and_flip(images, draws, 10).expand(-1, 3, -1, -1))


def test_draws_cover_their_range_and_differ_between_samples():
    draws = epoch_draws(3000, seed=0, network=0, epoch=0)
    assert [set(column.tolist()) for column in draws.T] == [set(range(9)), set(range(9)), {0, 1}]
    assert len({tuple(row) for row in draws.tolist()}) == 9 * 9 * 2
    assert draws.float().mean(dim=0).tolist() == pytest.approx([4, 4, 0.5], abs=0.2)


def test_draws_are_a_pure_function_of_seed_network_and_epoch():
    first = epoch_draws(50, seed=0, network=0, epoch=0)
    assert torch.equal(first, epoch_draws(50, seed=0, network=0, epoch=0))
    for other in ({"seed": 1}, {"network": 1}, {"epoch": 1}):
        stream = {"seed": 0, "network": 0, "epoch": 0, **other}
        assert not torch.equal(first, epoch_draws(50, **stream))


def test_padding_is_centered_and_black():
    padded = pad_to(torch.full((1, 1, 3, 3), 7, dtype=torch.uint8), 6)
    assert padded.shape == (1, 1, 6, 6)
    assert torch.equal(padded[0, 0, 1:4, 1:4], torch.full((3, 3), 7, dtype=torch.uint8))
    assert padded.sum() == 7 * 9


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize(channels_last):
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    normalize = Normalize(mean, std, device=torch.device("cpu"), channels_last=channels_last)
    result = normalize(images)
    center, spread = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(result, (images / 255 - center) / spread)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=wanted)
