from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError, DataError
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


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def labels(batches):
    return torch.cat([batch[1] for batch in batches]).tolist()


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


def test_number_of_workers_changes_nothing(make):
    alone, helped = make(workers=0), make(workers=2)
    assert same(list(alone.train_batches(1, 0, 3)), list(helped.train_batches(1, 0, 3)))
    assert same(list(alone.eval_batches("test")), list(helped.eval_batches("test")))


def test_starting_within_an_epoch_equals_going_straight_through(make):
    whole = list(make().train_batches(0, 0, 3))
    assert same(whole[1:], list(make().train_batches(0, 1, 3)))
    assert same(whole[1:2], list(make().train_batches(0, 1, 2)))


def test_networks_epochs_and_seeds_differ(make):
    base = list(make().train_batches(0, 0, 3))
    for other in (make(network=1), make(seed=1)):
        assert not same(base, list(other.train_batches(0, 0, 3)))
    assert not same(base, list(make().train_batches(1, 0, 3)))
    assert sorted(labels(base)) == [0] * 7 + [1] * 4 + [2]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_leave_the_global_stream_alone(make, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = make(workers=workers)
    list(data.train_batches(0, 0, 3))
    list(data.eval_batches("test"))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_resizes_and_crops_the_centre(make, image_root):
    images, _ = next(make().eval_batches("test"))
    original = Image.open(image_root / "val" / "cat" / "0.png")
    pixels = v2.CenterCrop(16)(v2.Resize(18)(v2.PILToTensor()(original))) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # PIL and tensors round their interpolation differently
    torch.testing.assert_close(images[0], (pixels - mean) / deviation, atol=0.05, rtol=0)


def test_unaugmented_training_images_are_cut_like_test_images(make):
    data = make(augment=False, batch_size=12)
    assert same(list(data.train_batches(0, 0, 1)), list(data.train_batches(0, 0, 1)))
    first, second = (next(data.train_batches(epoch, 0, 1)) for epoch in (0, 1))
    torch.testing.assert_close(first[0].sum(), second[0].sum())
    first, second = (next(make(batch_size=12).train_batches(epoch, 0, 1)) for epoch in (0, 1))
    assert abs(float(first[0].sum() - second[0].sum())) > 1


def test_classes_take_turns_so_that_the_first_images_are_balanced(make):
    data = make(train_samples=3, test_samples=5)
    assert sorted(labels(data.train_batches(0, 0, 1))) == [0, 1, 2]
    assert labels(data.eval_batches("test")) == [0, 1, 2, 0, 1]
    assert labels(make().eval_batches("test")) == [0, 1, 2, 0, 1, 0]


def test_validation_is_taken_from_train(make):
    one, other = make(val_fraction=0.25), make(val_fraction=0.25, network=1)
    assert one.has_validation
    assert one.train_size == 9
    assert same(list(one.eval_batches("val")), list(other.eval_batches("val")))
    everything = labels(one.eval_batches("val")) + labels(one.train_batches(0, 0, 3))
    assert sorted(everything) == [0] * 7 + [1] * 4 + [2]
    with pytest.raises(ConfigError, match="validation"):
        make().eval_batches("val")


def test_grey(make):
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
    with pytest.raises(DataError, match=f"{image_root}/val/eel holds no images"):
        make()


def test_classes_that_differ(make, image_root):
    (image_root / "val" / "eel").rename(image_root / "val" / "elk")
    with pytest.raises(DataError, match=f"{image_root} .* 'eel' is in only one"):
        make()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [0, 100])
def test_unreadable_image_is_named_in_one_line(make, image_root, workers, cut):
    broken = image_root / "train" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:cut])
    with pytest.raises(DataError, match=f"^{broken} cannot be read as an image") as caught:
        list(make(workers=workers).train_batches(0, 0, 3))
    assert "\n" not in str(caught.value)


PROGRAM = """
import multiprocessing, signal, subprocess, sys
import torch
from dist_graft.config import DataConfig
from dist_graft.training.data import load_data

torch.set_num_threads(1)
config = DataConfig(name="imagefolder", root=sys.argv[1], workers=2, image_size=16, batch_size=1)
data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
batches = data.train_batches(0, 0, 12)
next(batches)
workers = [str(process.pid) for process in multiprocessing.active_children()]
for name in ("INT", "TERM"):
    subprocess.run(["sh", "-c", f"kill -{name} " + " ".join(workers)], check=True)
print(len(workers), sum(1 for _ in zip(batches, range(10))), flush=True)
raise RuntimeError("the traceback keeps the loader alive")
"""


def test_only_the_trainer_ends_its_loader_workers(image_root):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(image_root)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "2 10\n", done.stderr
    assert done.stderr.strip().endswith("RuntimeError: the traceback keeps the loader alive")
