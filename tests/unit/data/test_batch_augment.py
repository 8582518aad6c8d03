from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.config import DataConfig
from dist_graft.training.data.batch_augment import BatchAugment, draw_erased, draw_mixed

CLASSES = 5


def batch(size: int, side: int, *, channels_last: bool = False) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(size)
    images = torch.rand(size, 3, side, side, generator=random) + 1
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (size,), generator=random)


def augmented(
    size: int, side: int, *, step: int = 0, part: slice | None = None, **options: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, or a part of it, after augmentation."""
    part = part or slice(0, size)
    images, labels = batch(size, side)
    return BatchAugment(DataConfig(**options), CLASSES)(  # type: ignore[arg-type]
        images[part], labels[part], stream=(1, 2, 3, step), positions=part, size=size
    )


def mixed_by_hand(
    images: torch.Tensor, labels: torch.Tensor, boxes: Any, shares: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Image by image, pixel by pixel."""
    before, size = images.numpy(), len(images)
    after, targets = before.copy(), np.zeros((size, CLASSES))
    for k, (top, bottom, left, right) in enumerate(boxes):
        other = k ^ 1 if k ^ 1 < size else k
        if bottom > top:
            after[k, :, top:bottom, left:right] = before[other, :, top:bottom, left:right]
        else:
            after[k] = (1 - shares[k]) * before[k] + shares[k] * before[other]
        targets[k, labels[k]] += 1 - shares[k]
        targets[k, labels[other]] += shares[k]
    return after, targets


@given(
    st.integers(1, 7),
    st.integers(2, 9),
    st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.5, 0.5)]),
    st.integers(0, 50),
)
def test_mixing_equals_the_loop_over_images(
    size: int, side: int, alphas: tuple[float, float], step: int
) -> None:
    mixup, cutmix = alphas
    draws: list[Any] = []

    def recorded(*arguments: Any) -> Any:
        draws.append(draw_mixed(*arguments))
        return draws[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_graft.training.data.batch_augment.draw_mixed", recorded)
        images, targets = augmented(size, side, step=step, mixup=mixup, cutmix=cutmix)
    after, expected = mixed_by_hand(*batch(size, side), *draws[0])
    np.testing.assert_allclose(images.numpy(), after, rtol=1e-6)
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
    assert targets.dtype == torch.float32
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-6)


def test_the_share_of_a_box_is_its_area_and_follows_beta() -> None:
    random = np.random.default_rng(0)
    boxes, shares = draw_mixed(4000, 32, 0.0, 1.0, random)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 32**2
    assert np.array_equal(shares, area)
    assert boxes.min() >= 0
    assert boxes.max() <= 32
    # 1/2 - 1/5 + 1/48 = 0.32 for boxes that are cut off at the edges; half edges are rounded down
    assert shares.mean() == pytest.approx(0.30, abs=0.02)
    boxes, shares = draw_mixed(4000, 32, 0.2, 0.0, random)
    assert not boxes.any()
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)  # of Beta(a, a)
    boxes, _ = draw_mixed(4000, 32, 1.0, 1.0, random)
    assert np.mean(boxes[:, 0] < boxes[:, 1]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("side", "probability"), [(32, 0.25), (8, 1.0), (32, 0.0)])
def test_erased_boxes_fit_and_have_the_published_areas(side: int, probability: float) -> None:
    boxes = draw_erased(4000, side, probability, np.random.default_rng(0))
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    erased = (height > 0) & (width > 0)
    assert erased.mean() == pytest.approx(probability, abs=0.05)
    assert boxes.min() >= 0
    assert boxes.max() <= side
    if side == 32 and probability:
        areas = (height * width)[erased] / side**2
        assert areas.min() > 0.01
        assert areas.max() < 0.36
        assert areas.mean() == pytest.approx(0.175, abs=0.02)
        assert {0, side} <= {*boxes[erased, 0], *boxes[erased, 1]}  # also at the edges


def test_erased_pixels_are_zero_and_all_others_unchanged() -> None:
    images, labels = augmented(9, 12, random_erasing=0.7)
    before, classes = batch(9, 12)
    assert torch.equal(labels, classes)
    gone = images == 0
    assert torch.equal(images[~gone], before[~gone])
    assert torch.equal(gone[:, 0], gone[:, 2])
    assert 0 < gone.flatten(1).any(1).sum() < 9


ALL = {"mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.5}


@pytest.mark.parametrize("part", [slice(0, 4), slice(2, 6), slice(4, 7)])
def test_a_part_of_a_batch_is_that_part_of_the_whole(part: slice) -> None:
    """Parts of whole pairs."""
    whole, targets = augmented(7, 8, **ALL)
    images, some = augmented(7, 8, part=part, **ALL)
    assert torch.equal(images, whole[part])
    assert torch.equal(some, targets[part])


def test_draws_depend_on_the_step_and_a_batch_may_be_empty() -> None:
    assert not torch.equal(augmented(6, 8, **ALL)[0], augmented(6, 8, step=1, **ALL)[0])
    images, targets = augmented(6, 8, part=slice(0, 0), **ALL)
    assert images.shape == (0, 3, 8, 8)
    assert targets.shape == (0, CLASSES)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    images, labels = batch(6, 8, channels_last=True)
    augment = BatchAugment(DataConfig(**ALL), CLASSES)  # type: ignore[arg-type]
    whole = {"stream": (1, 2, 3, 0), "positions": slice(0, 6), "size": 6}
    on_gpu = augment(images.cuda(), labels.cuda(), **whole)  # type: ignore[arg-type]
    for found, expected in zip(on_gpu, augment(images, labels, **whole), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found.cpu(), expected)


def test_the_memory_format_is_kept() -> None:
    images, labels = batch(6, 8, channels_last=True)
    augment = BatchAugment(DataConfig(**ALL), CLASSES)  # type: ignore[arg-type]
    result, _ = augment(images, labels, stream=(0, 0, 0, 0), positions=slice(0, 6), size=6)
    assert result.is_contiguous(memory_format=torch.channels_last)
