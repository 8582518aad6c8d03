from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import pickle
import subprocess
import sys
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision import datasets

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError, DataError
from dist_graft.training.data import (
    check_dataset_name,
    dataset_names,
    ensure_available,
    load_data,
)
from dist_graft.training.data.sources import (
    DATASET_INFO,
    fashion_folder,
    read_fashion_mini,
    read_idx,
    read_small,
)


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


@pytest.fixture
def fashion_root(tmp_path):
    folder = fashion_folder(str(tmp_path))
    folder.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 6)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(idx(np.arange(count) % 10))
        )
    return tmp_path


def test_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(read_idx(tmp_path / "plain"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "packed.gz"), array)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an idx file"),
        (b"\x00\x00\x08", "not an idx file"),
        (b"\x00\x00\x08\x03\x00", "not an idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01abcd", "not an idx file"),
        (idx(np.zeros((4, 5)))[:-1], "damaged: .* 20 bytes of data, got 19"),
        (idx(np.zeros((4, 5))) + b"x", "damaged"),
    ],
)
def test_damaged_idx_is_named(tmp_path, content, reason):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is {reason}"):
        read_idx(path)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(idx(np.zeros(9)))[:-9]], ids=["not gzip", "cut short"]
)
def test_damaged_gzip_is_named(tmp_path, content):
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        read_idx(path)


def test_fashion_mnist(fashion_root):
    train, test, _ = read_small("fashion-mnist", str(fashion_root))
    assert train.images.shape == (20, 1, 28, 28)
    assert test.labels.tolist() == list(range(6))
    data = load_data(
        DataConfig(name="fashion-mnist", root=str(fashion_root), batch_size=16),
        seed=0,
        network=0,
        device=torch.device("cpu"),
        channels_last=True,
    )
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 28)
    assert (data.train_size, data.steps_per_epoch) == (20, 2)


def test_missing_fashion_mnist_says_what_to_run(tmp_path):
    with pytest.raises(DataError) as caught:
        read_small("fashion-mnist", str(tmp_path))
    text = str(caught.value)
    assert str(tmp_path / "FashionMNIST" / "raw") in text
    assert f"dist-graft prepare fashion-mnist --root {tmp_path}" in text
    assert "\n" not in text


def test_inconsistent_fashion_mnist_files(fashion_root):
    folder = fashion_folder(str(fashion_root))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(19)))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte .* 20 images"):
        read_small("fashion-mnist", str(fashion_root))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(20, 10)))
    with pytest.raises(
        DataError, match=r"train-labels-idx1-ubyte .* 0 \.\.\. 9, got 10 for image 0"
    ):
        read_small("fashion-mnist", str(fashion_root))
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 27, 28))))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte .* 28 x 28"):
        read_small("fashion-mnist", str(fashion_root))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_damaged_fashion_mini_is_named(tmp_path, content):
    path = tmp_path / "mini.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} cannot be read: .*; reinstall dist_graft$"):
        read_fashion_mini(path)


MINI = {
    "train_images": np.zeros((3, 28, 28), np.uint8),
    "train_labels": np.array([0, 9, 3]),
    "test_images": np.zeros((2, 28, 28), np.uint8),
    "test_labels": np.array([1, 2]),
}


@pytest.mark.parametrize(
    ("part", "array", "reason"),
    [
        (
            "train_images",
            np.zeros((3, 27, 28), np.uint8),
            r"28 pixels, got uint8 \(3, 27, 28\)",
        ),
        ("train_images", np.zeros(3, np.uint8), "28 x 28 pixels"),
        ("train_images", np.zeros((3, 28, 28), np.float32), "28 x 28 pixels, got float32"),
        ("test_labels", np.array([1, 2, 3]), "a class for each of 2 images, got"),
        ("test_labels", np.array([1.0, 2.0]), "a class for each of 2 images, got float64"),
        ("test_labels", np.array([1, 10]), "got 10 for image 1"),
        ("train_labels", np.array([0, -1, 0]), "got -1 for image 1"),
        ("train_labels", np.array([{}, 1, 0]), "cannot be read"),
    ],
)
def test_invalid_arrays_in_fashion_mini_are_named(tmp_path, part, array, reason):
    path = tmp_path / "mini.npz"
    np.savez(path, **MINI)
    assert len(read_fashion_mini(path)[0].images) == 3
    np.savez(path, **{**MINI, part: array})
    with pytest.raises(DataError, match=f"^{path} .*{reason}.*; reinstall dist_graft$"):
        read_fashion_mini(path)


def test_a_single_array_is_not_fashion_mini(tmp_path):
    with (tmp_path / "mini.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"mini.npz cannot be read: .*; reinstall dist_graft$"):
        read_fashion_mini(tmp_path / "mini.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_every_damage_of_an_npz_raises_data_error(tmp_path, compressed):
    path = tmp_path / "mini.npz"
    (np.savez_compressed if compressed else np.savez)(path, **MINI)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        content[random.integers(len(content))] = random.integers(256)
        path.write_bytes(content[: random.integers(1, 2 * len(content))])
        with contextlib.suppress(DataError):
            read_fashion_mini(path)


def test_a_damaged_fashion_mnist_says_what_to_do(fashion_root):
    path = fashion_folder(str(fashion_root)) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError) as caught:
        read_small("fashion-mnist", str(fashion_root))
    text = str(caught.value)
    assert text.startswith(f"{path} cannot be read: ")
    advice = f"remove it and run dist-graft prepare fashion-mnist --root {fashion_root}"
    assert text.endswith(advice)
    assert "\n" not in text


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Four images a batch file, in both of CIFAR's layouts, with checksums to match."""
    for kind, label_key in ((datasets.CIFAR10, "labels"), (datasets.CIFAR100, "fine_labels")):
        folder = tmp_path / kind.base_folder
        folder.mkdir()

        def write(name, content, folder=folder):
            packed = pickle.dumps(content, protocol=2)
            (folder / name).write_bytes(packed)
            return hashlib.md5(packed, usedforsecurity=False).hexdigest()

        for attribute in ("train_list", "test_list"):
            checked = []
            for number, (name, _) in enumerate(getattr(kind, attribute)):
                pixels = np.random.default_rng(number).integers(0, 256, (4, 3072), dtype=np.uint8)
                content = {"data": pixels, label_key: [0, 1, 2, 3]}
                checked.append([name, write(name, content)])
            monkeypatch.setattr(kind, attribute, checked)
        names = {kind.meta["key"]: [str(k) for k in range(10)]}
        md5 = write(kind.meta["filename"], names)
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return tmp_path


@pytest.mark.parametrize(("name", "count"), [("cifar10", 20), ("cifar100", 4)])
def test_cifar(cifar_root, name, count):
    ensure_available(DataConfig(name=name, root=str(cifar_root)))
    train, test, info = read_small(name, str(cifar_root))
    assert info.classes == tuple("0123456789")
    assert train.images.shape == (count, 3, 32, 32)
    assert train.labels.tolist() == [0, 1, 2, 3] * (count // 4)
    assert len(test.images) == 4
    first = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    np.testing.assert_array_equal(train.images[0], first[0].reshape(3, 32, 32))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/train"),
        ("cifar100", "cifar-100-python/meta"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_damaged_cifar_names_the_file(cifar_root, name, file, missing):
    path = cifar_root / file
    path.unlink() if missing else path.write_bytes(path.read_bytes()[:-1])
    config = DataConfig(name=name, root=str(cifar_root), download=False)
    with pytest.raises(DataError, match=f"^{path} is missing or damaged, run dist-graft prepare"):
        ensure_available(config)


def test_jobs_download_one_after_the_other(cifar_root, tmp_path, monkeypatch):
    """The second one finds what the first one has downloaded."""
    folder, hidden = cifar_root / "cifar-100-python", tmp_path / "hidden"
    folder.rename(hidden)
    waits = threading.Event()
    lock = fcntl.flock

    def announced(*arguments):
        waits.set()
        lock(*arguments)

    def no_download(*_, **__):
        raise AssertionError("downloaded twice")

    config = DataConfig(name="cifar100", root=str(cifar_root))
    with (cifar_root / ".cifar100.lock").open("w") as first, ThreadPoolExecutor(1) as pool:
        lock(first, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", announced)
        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_download)
        second = pool.submit(ensure_available, config)
        assert waits.wait(60)
        hidden.rename(folder)
        lock(first, fcntl.LOCK_UN)
        second.result(60)


def test_missing_cifar_without_download(tmp_path):
    config = DataConfig(name="cifar100", root=str(tmp_path), download=False)
    with pytest.raises(DataError) as caught:
        ensure_available(config)
    text = str(caught.value)
    assert str(tmp_path / "cifar-100-python") in text
    assert f"dist-graft prepare cifar100 --root {tmp_path}" in text
    assert "\n" not in text


def test_a_failed_download_names_folder_and_cause(tmp_path, monkeypatch):
    def unreachable(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", unreachable)
    config = DataConfig(name="cifar10", root=str(tmp_path))
    with pytest.raises(DataError, match=r"cifar-10-batches-py .*no route to host") as caught:
        ensure_available(config)
    assert "\n" not in str(caught.value)


def test_statistics_by_number_of_channels():
    assert DATASET_INFO["fashion-mnist"].statistics(3)[0] == (0.2860,) * 3
    (mean,), (std,) = DATASET_INFO["cifar10"].statistics(1)
    assert mean == pytest.approx(0.299 * 0.4914 + 0.587 * 0.4822 + 0.114 * 0.4465)
    assert 0.24 < std < 0.25
    cifar = DATASET_INFO["cifar10"]
    assert cifar.statistics(3) == (cifar.mean, cifar.std)


def test_dataset_names_are_legal():
    for name in dataset_names():
        check_dataset_name(name)


def test_an_unknown_name_lists_similar_and_legal_ones():
    with pytest.raises(ConfigError, match=r"got 'cifar1' \(did you mean cifar10.*\?\)") as caught:
        check_dataset_name("cifar1")
    assert all(name in str(caught.value) for name in dataset_names())
    assert "\n" not in str(caught.value)


def test_no_hint_without_a_similar_name():
    with pytest.raises(ConfigError, match=r"got 'zzzz'$"):
        check_dataset_name("zzzz")


def test_ensure_available_rejects_unknown_names_and_writes_nothing_for_the_others(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.name"):
        ensure_available(DataConfig(name="nothing"))
    for name in ("fashion-mini", "fashion-mnist", "imagefolder"):
        ensure_available(DataConfig(name=name, root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_names_are_checked_without_heavy_imports():
    program = (
        "import sys; from dist_graft.training.data import dataset_names; dataset_names(); "
        "print([m for m in ('torch', 'torchvision', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
