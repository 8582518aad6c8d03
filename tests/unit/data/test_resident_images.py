from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sample_data import make_resident, same, targets

from dist_graft.errors import ConfigError
from dist_graft.training.data import images
from dist_graft.training.data.images import grayscale
from dist_graft.training.data.order import Share


def test_shapes_types_and_sizes():
    data = make_resident(channels_last=True)
    assert (data.num_classes, data.channels, data.image_size) == (200, 3, 12)
    assert (data.train_size, data.steps_per_epoch, data.has_validation) == (30, 4, False)
    batches = list(data.train_batches(0, 0, 4))
    assert [len(y) for _, y in batches] == [8, 8, 8, 6]
    images, classes = batches[0]
    assert images.shape == (8, 3, 12, 12)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert classes.dtype == torch.int64


def test_an_epoch_has_every_training_image_once():
    assert sorted(targets(make_resident().train_batches(0, 0, 4))) == list(range(30))


def test_unaugmented_images_are_the_originals():
    data = make_resident(augment=False)
    [*tested] = data.eval_batches("test")
    assert targets(tested) == list(range(100, 111))
    images = {
        int(y): x for batch in data.train_batches(0, 0, 4) for x, y in zip(*batch, strict=True)
    }
    random = np.random.default_rng(0).integers(0, 256, (30, 3, 12, 12), dtype=np.uint8)
    for number, pixels in enumerate(random):
        torch.testing.assert_close(images[number], torch.from_numpy(pixels).float())


def test_each_sample_has_its_own_augmentation():
    plain = next(make_resident(augment=False).train_batches(0, 0, 1))[0]
    augmented = next(make_resident().train_batches(0, 0, 1))[0]
    corners = set()
    for image, cut in zip(plain, augmented, strict=True):
        canvas = torch.nn.functional.pad(image, (4, 4, 4, 4))
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(
                canvas[:, top : top + 12, left : left + 12], cut.flip(2) if flip else cut
            )
        ]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) > 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": False},
        {"rand_augment": "2,9"},
        {"share": Share(1, 2)},
        {"share": Share(1, 2), "mixup": 0.5},
    ],
)
def test_batches_prepared_together_equal_those_prepared_one_by_one(monkeypatch, options):
    """An accelerator prepares several together, and from another step after an interruption."""
    single = list(make_resident(**options).train_batches(1, 0, 4))
    monkeypatch.setattr(images, "steps_at_once", lambda device, batch_bytes: 3)
    data = make_resident(**options)
    for first in (0, 2):
        together = list(data.train_batches(1, first, 4))
        assert len(together) == 4 - first
        for one, other in zip(single[first:], together, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
            if "mixup" not in options:  # it takes this process's part of each batch
                assert all(tensor.storage_offset() == 0 for tensor in other)


def test_every_test_image_once_in_fixed_order():
    data = make_resident(batch_size=4, test_samples=10)
    first, second = list(data.eval_batches("test")), list(data.eval_batches("test"))
    assert targets(first) == list(range(100, 110))
    assert same(first, second)


def test_image_size_pads_with_normalized_black():
    data = make_resident(image_size=17, mean=0.5, std=0.25)
    assert data.image_size == 17
    images = next(data.eval_batches("test"))[0]
    assert images.shape == (8, 3, 17, 17)
    inside = torch.zeros(17, 17, dtype=torch.bool)
    inside[2:14, 2:14] = True
    assert torch.all(images[:, :, ~inside] == -2.0)
    original = next(make_resident(mean=0.5, std=0.25).eval_batches("test"))[0]
    assert torch.equal(images[:, :, 2:14, 2:14], original)
    assert next(data.train_batches(0, 0, 1))[0].shape == (8, 3, 17, 17)


def test_image_size_below_the_datasets():
    with pytest.raises(ConfigError, match=r"data\.image_size must be at least 12.*got 11"):
        make_resident(image_size=11)


def test_grayscale_images_as_rgb():
    data = make_resident(native_channels=1, channels=3)
    assert data.channels == 3
    images = next(data.train_batches(0, 0, 1))[0]
    assert images.shape[1] == 3
    assert torch.equal(images[:, 0], images[:, 2])
    single = next(make_resident(native_channels=1).train_batches(0, 0, 1))[0]
    assert torch.equal(images[:, :1], single)


def test_rgb_images_as_grayscale():
    data = make_resident(channels=1)
    assert data.channels == 1
    images = next(data.eval_batches("test"))[0]
    rgb = next(make_resident().eval_batches("test"))[0]
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(images, luma, atol=0.51, rtol=0)


def test_grayscale_equals_pil():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3, 20, 20), dtype=np.uint8)
    pixels[0] = 255
    result = grayscale(torch.from_numpy(pixels)).numpy()
    for image, luma in zip(pixels, result, strict=True):
        expected = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"))
        np.testing.assert_array_equal(luma[0], expected)


NOISE = {"transform": "own_components:add_noise", "transform_kwargs": {"std": 2.0}}


class TestTransform:
    """data.transform."""

    def test_draws_are_new_for_each_batch_and_network_and_the_same_when_resumed(self):
        def noise(first=0, epoch=0, **options):
            """What the transform adds to each batch from the first one on."""
            pairs = (
                list(make_resident(**options, **more).train_batches(epoch, first, 3))
                for more in (NOISE, {})
            )
            return [noisy - plain for (noisy, _), (plain, _) in zip(*pairs, strict=True)]

        whole = noise()
        assert all(1 < batch.std() < 5 for batch in whole)
        torch.manual_seed(7)  # the state of torch's generator does not matter
        torch.testing.assert_close(noise(first=1), whole[1:])
        others = [whole[1], *noise(network=1, seed=0)[:1], *noise(epoch=1)[:1], *noise(seed=1)[:1]]
        assert not any(torch.allclose(whole[0], other) for other in others)

    def test_it_is_the_last_step_and_spares_evaluation(self):
        mixed = {"mixup": 0.4, "random_erasing": 0.5}
        plain = next(make_resident(**mixed).train_batches(0, 0, 1))
        noisy = next(make_resident(**mixed, **NOISE).train_batches(0, 0, 1))
        assert torch.equal(plain[1], noisy[1])
        assert not torch.equal(plain[0], noisy[0])
        still = {"transform": "own_components:add_noise", "transform_kwargs": {"std": 0.0}}
        assert torch.equal(
            next(make_resident(**mixed, **still).train_batches(0, 0, 1))[0], plain[0]
        )
        tested = (list(make_resident(**more).eval_batches("test")) for more in (NOISE, {}))
        assert same(*tested)

    def test_a_wrong_number_of_samples(self):
        data = make_resident(transform="own_components:drop_one")
        with pytest.raises(ConfigError, match=r"drop_one must return 8 samples, got 7"):
            next(data.train_batches(0, 0, 1))

    def test_replicas_have_their_own_draws(self):
        def images(replica, **options):
            data = make_resident(share=Share(replica, 2), augment=False, **options)
            return next(data.train_batches(0, 0, 1))[0]

        first, second = (images(k, **NOISE) - images(k) for k in (0, 1))
        assert first.shape == second.shape
        assert not torch.allclose(first, second)
