from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from sample_data import same, targets
from torchvision.transforms import v2

from dist_graft.config import DataConfig
from dist_graft.errors import DataError
from dist_graft.training.data import load_data


@pytest.fixture
def make(image_root):
    def make(*, seed=0, network=0, **options):
        defaults = {"batch_size": 4, "image_size": 16, "workers": 0}
        config = DataConfig(name="imagefolder", root=str(image_root), **{**defaults, **options})
        return load_data(
            config, seed=seed, network=network, device=torch.device("cpu"), channels_last=True
        )

    return make


def test_shapes_types_and_sizes(make):
    data = make()
    assert (data.num_classes, data.channels, data.image_size) == (3, 3, 16)
    assert (data.train_size, data.steps_per_epoch, data.has_validation) == (12, 3, False)
    images, classes = next(data.train_batches(0, 0, 1))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert classes.dtype == torch.int64
    assert make(image_size=None).image_size == 224


@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "random_erasing": 0.5, "rand_augment": 9}])
def test_batches_do_not_depend_on_workers(make, options):
    none, two = make(workers=0, **options), make(workers=2, **options)
    assert same(list(none.train_batches(1, 0, 3)), list(two.train_batches(1, 0, 3)))
    assert same(list(none.eval_batches("test")), list(two.eval_batches("test")))


def test_evaluation_resizes_and_crops_the_center(make, image_root):
    images, _ = next(make().eval_batches("test"))
    original = Image.open(image_root / "val" / "cat" / "0.png")
    pixels = v2.CenterCrop(16)(v2.Resize(18)(v2.PILToTensor()(original))) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # PIL and tensors round their interpolation differently
    torch.testing.assert_close(images[0], (pixels - mean) / std, atol=0.05, rtol=0)


def test_without_augmentation_training_images_are_transformed_like_test_images(make):
    data = make(augment=False, batch_size=12)
    assert same(list(data.train_batches(0, 0, 1)), list(data.train_batches(0, 0, 1)))
    first, second = (next(data.train_batches(epoch, 0, 1)) for epoch in (0, 1))
    torch.testing.assert_close(first[0].sum(), second[0].sum())
    first, second = (next(make(batch_size=12).train_batches(epoch, 0, 1)) for epoch in (0, 1))
    assert abs(float(first[0].sum() - second[0].sum())) > 1


def test_classes_alternate_so_that_the_first_images_are_balanced(make):
    data = make(train_samples=3, test_samples=5)
    assert sorted(targets(data.train_batches(0, 0, 1))) == [0, 1, 2]
    assert targets(data.eval_batches("test")) == [0, 1, 2, 0, 1]
    assert targets(make().eval_batches("test")) == [0, 1, 2, 0, 1, 0]


def test_grayscale(make):
    data = make(channels=1)
    assert data.channels == 1
    assert next(data.train_batches(0, 0, 1))[0].shape == (4, 1, 16, 16)
    assert next(data.eval_batches("test"))[0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_folder(make, image_root, split):
    shutil.rmtree(image_root / split)
    with pytest.raises(DataError, match=f"{image_root / split} is missing") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_folder_without_classes(make, image_root):
    shutil.rmtree(image_root / "train")
    (image_root / "train").mkdir()
    with pytest.raises(DataError, match=f"{image_root}/train has no class folders"):
        make()


def test_class_without_images(make, image_root):
    (image_root / "val" / "eel" / "0.png").rename(image_root / "val" / "eel" / "0.txt")
    with pytest.raises(DataError, match=f"{image_root}/val/eel has no images .*jpg.*remove"):
        make()
    shutil.rmtree(image_root / "train" / "dog")
    (image_root / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=f"{image_root}/train/dog has no images"):
        make()


def test_classes_that_differ(make, image_root):
    (image_root / "val" / "eel").rename(image_root / "val" / "elk")
    with pytest.raises(DataError, match=f"^{image_root}/val/eel is missing.*train/eel.*same class"):
        make()
    (image_root / "val" / "elk").rename(image_root / "val" / "eel")
    (image_root / "train" / "cat").rename(image_root / "cat")
    with pytest.raises(DataError, match=f"^{image_root}/train/cat is missing.*val/cat.*same class"):
        make()


def truncate(path, size=100):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_image_is_named_in_one_line(make, image_root, workers, size, split):
    broken = image_root / split / "dog" / "1.png"
    truncate(broken, size)
    data = make(workers=workers)
    with pytest.raises(DataError, match=f"^{broken} cannot be read as an image: ") as caught:
        list(data.train_batches(0, 0, 3) if split == "train" else data.eval_batches("test"))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "--data.skip_broken true" in str(caught.value)
    assert data.skipped == {}


@pytest.mark.parametrize("skip_broken", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_never_skipped(make, image_root, workers, skip_broken):
    data = make(workers=workers, skip_broken=skip_broken)
    gone = image_root / "train" / "dog" / "2.png"
    gone.unlink()
    with pytest.raises(DataError, match=f"^{gone} cannot be read: No such file or directory$"):
        list(data.train_batches(0, 0, 3))


def rows(batches):
    return [list(zip(images, classes.tolist(), strict=True)) for images, classes in batches]


class TestSkipBroken:
    @pytest.fixture
    def broken(self, image_root):
        """Two of the training images and one for testing."""
        paths = [image_root / "train/cat/3.png", image_root / "train/eel/0.png"]
        return [*paths, image_root / "val/cat/1.png"]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_other_images_are_unchanged(self, make, broken, workers):
        whole, whole_test = rows(make().train_batches(1, 0, 3)), rows(make().eval_batches("test"))
        for path in broken:
            truncate(path)
        data = make(workers=workers, skip_broken=True)
        assert (data.train_size, data.steps_per_epoch) == (12, 3)
        left, left_test = rows(data.train_batches(1, 0, 3)), rows(data.eval_batches("test"))
        assert list(data.skipped)[2:] == [str(broken[2])]
        assert set(data.skipped) == {str(path) for path in broken}
        assert [len(batch) for batch in left_test] == [3, 2]
        assert sum(map(len, left)) == 10
        for before, after in zip(whole + whole_test, left + left_test, strict=True):
            rest = iter(before)
            for image, label in after:
                assert any(torch.equal(image, other) and label == same for other, same in rest)

    def test_batches_do_not_depend_on_workers(self, make, broken):
        for path in broken:
            truncate(path)
        none, two = make(skip_broken=True), make(skip_broken=True, workers=2)
        assert same(list(none.train_batches(1, 0, 3)), list(two.train_batches(1, 0, 3)))
        assert same(list(none.eval_batches("test")), list(two.eval_batches("test")))
        assert list(none.skipped.items()) == list(two.skipped.items())

    def test_each_is_counted_once(self, make, broken):
        truncate(broken[0], 0)
        data = make(skip_broken=True)
        for epoch in (0, 1):
            list(data.train_batches(epoch, 0, 3))
        assert data.skipped == {str(broken[0]): "file is empty"}
        assert make(skip_broken=True).skipped == {}

    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_batch_of_broken_images_is_empty(self, make, broken, channels):
        truncate(broken[0])
        truncate(broken[2])
        data = make(skip_broken=True, batch_size=1, channels=channels)
        sizes = [len(labels) for _, labels in data.train_batches(0, 0, 12)]
        assert sorted(sizes) == [0] + [1] * 11
        (empty,) = (images for images, _ in data.train_batches(0, 0, 12) if not len(images))
        assert empty.shape == (0, channels, 16, 16)
        assert empty.dtype == torch.float32
        mixed = make(skip_broken=True, batch_size=1, channels=channels, mixup=0.5, cutmix=0.5)
        assert sorted(len(labels) for _, labels in mixed.train_batches(0, 0, 12)) == sorted(sizes)
        assert [len(classes) for _, classes in data.eval_batches("test")] == [1] * 5

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_all_images_broken_is_an_error(self, make, image_root, split):
        data = make(skip_broken=True, workers=1)
        for path in (image_root / split).glob("*/*.png"):
            truncate(path)
        with pytest.raises(
            DataError, match=f"^none of .* {image_root}/{split}/cat/0.png"
        ) as caught:
            list(data.train_batches(0, 0, 3) if split == "train" else data.eval_batches("test"))
        assert "\n" not in str(caught.value)
