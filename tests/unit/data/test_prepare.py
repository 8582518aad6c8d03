from __future__ import annotations

import gzip
import urllib.error

import numpy as np
import pytest
from torchvision import datasets

from dist_graft.errors import ConfigError, DataError
from dist_graft.training.data import prepare as module
from dist_graft.training.data.prepare import FASHION_FILES, prepare
from dist_graft.training.data.sources import fashion_folder, read_small

COUNTS = {"train": 30, "t10k": 10}


def idx(*shape):
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">u4").tobytes()
    return header + bytes(int(np.prod(shape)))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of gzipped files; prepare is patched to expect their number of images."""
    monkeypatch.setattr(module, "FASHION_COUNTS", COUNTS)
    monkeypatch.setattr(module, "DEBIAN_FASHION", tmp_path / "debian")
    folder = tmp_path / "debian"
    folder.mkdir()
    for prefix, count in COUNTS.items():
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(*shape)))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    for kind in (datasets.FashionMNIST, datasets.CIFAR10):
        monkeypatch.setattr(kind, "download", unreachable)


def test_unpacks_debians_package(source, tmp_path):
    root = str(tmp_path / "data")
    line = prepare("fashion-mnist", root=root)
    assert str(fashion_folder(root)) in line
    assert "\n" not in line
    assert sorted(p.name for p in fashion_folder(root).iterdir()) == sorted(FASHION_FILES)
    train, test, _ = read_small("fashion-mnist", root)
    assert (len(train.images), len(test.images)) == (30, 10)


def test_a_second_call_changes_nothing(source, tmp_path):
    root = str(tmp_path / "data")
    first = prepare("fashion-mnist", root=root, source=str(source))
    times = [p.stat().st_mtime_ns for p in fashion_folder(root).iterdir()]
    for path in source.iterdir():
        path.unlink()
    assert prepare("fashion-mnist", root=root, source=str(source)) == first
    assert [p.stat().st_mtime_ns for p in fashion_folder(root).iterdir()] == times


def test_damaged_file_is_replaced(source, tmp_path):
    root = str(tmp_path / "data")
    prepare("fashion-mnist", root=root)
    damaged = fashion_folder(root) / FASHION_FILES[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    prepare("fashion-mnist", root=root)
    assert len(read_small("fashion-mnist", root)[0].images) == 30


def test_damaged_source_is_named_and_nothing_is_written(source, tmp_path):
    broken = source / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{broken} cannot be read"):
        prepare("fashion-mnist", root=str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_source_with_too_few_images(source, tmp_path):
    for name, shape in (("images-idx3", (5, 28, 28)), ("labels-idx1", (5,))):
        (source / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(*shape)))
    with pytest.raises(DataError, match=r"must contain 30 images .* got 5"):
        prepare("fashion-mnist", root=str(tmp_path / "data"))


def test_missing_source_says_what_to_do(source, tmp_path):
    with pytest.raises(DataError) as caught:
        prepare("fashion-mnist", root=str(tmp_path / "data"), source=str(tmp_path / "none"))
    for part in (str(tmp_path / "none"), "dataset-fashion-mnist", "--source DIR"):
        assert part in str(caught.value)


def test_no_package_and_no_network(source, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(module, "DEBIAN_FASHION", tmp_path / "none")
    with pytest.raises(DataError) as caught:
        prepare("fashion-mnist", root=str(tmp_path / "data"))
    for part in ("no route to host", "dataset-fashion-mnist", "--source DIR"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unwritable_folder(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare("fashion-mnist", root=str(tmp_path / "file"))


def test_cifar_is_downloaded(tmp_path, no_network):
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        prepare("cifar10", root=str(tmp_path))


def test_names_with_nothing_to_prepare(tmp_path):
    assert "ships with" in prepare("fashion-mini", root=str(tmp_path))
    assert "train/CLASS" in prepare("imagefolder", root=str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean fashion-mnist"):
        prepare("fashion-mnst", root=str(tmp_path))
