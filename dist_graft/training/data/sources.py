"""Reading the small data sets into arrays of bytes."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_graft.errors import DataError
from dist_graft.references import is_reference

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""

FASHION_MINI = Path(__file__).parent / "fashion_mini" / "fashion_mini.npz"
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""Where torchvision keeps CIFAR inside data.root."""

_NPZ_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError),
    *(TypeError, zipfile.BadZipFile, zlib.error),
)
"""What numpy and zipfile raise for a file that is no npz, or a damaged one."""


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 [n, channels, side, side]; labels: int64 [n], 0-based classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a data set; mean and deviation a channel, of pixels in [0, 1]."""

    num_classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation for images turned grey (1) or into colour (3).

        A grey image's deviation is taken as the luma of the colours', as if these moved together.
        """
        return _as_channels(self.mean, channels), _as_channels(self.deviation, channels)


_FASHION = Facts(num_classes=10, mean=(0.2860,), deviation=(0.3530,))
FACTS = {
    "fashion-mini": _FASHION,
    "fashion-mnist": _FASHION,
    "cifar10": Facts(
        num_classes=10, mean=(0.4914, 0.4822, 0.4465), deviation=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": Facts(
        num_classes=100, mean=(0.5071, 0.4865, 0.4409), deviation=(0.2673, 0.2564, 0.2762)
    ),
}


def _as_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if channels == 3:
        return values * 3
    return (sum(value * weight for value, weight in zip(values, LUMA, strict=True)),)


def read_small(name: str, root: str) -> tuple[ImageSet, ImageSet, Facts]:
    """Training and test set of a small data set, whole, and what is known of it.

    Raises: DataError when it is missing or damaged; ConfigError for a function of the user's that
        is not there.
    """
    if is_reference(name):
        from dist_graft.training.data.own import read_own

        return read_own(name, root)
    if name == "fashion-mini":
        return *read_fashion_mini(FASHION_MINI), FACTS[name]
    if name == "fashion-mnist":
        return *_read_fashion_mnist(root), FACTS[name]
    train, test = (_read_cifar(name, root, train=train) for train in (True, False))
    return train, test, FACTS[name]


@contextlib.contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Add to a DataError's text what to do."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; {advice}") from error


def fashion_folder(root: str) -> Path:
    """Where Fashion-MNIST's idx files lie inside data.root (torchvision's layout)."""
    return Path(root) / "FashionMNIST" / "raw"


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked when its name ends in .gz; DataError when it cannot be read."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Array of bytes in an idx file, gzipped when its name ends in .gz.

    Raises: DataError naming the file when it cannot be read, or its length is not what its header
    says.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header announces {math.prod(shape)} bytes of data, "
            f"it has {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def find_idx(folder: Path, name: str) -> Path | None:
    """The idx file of this name in a folder, plain or else gzipped; None when there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_fashion_split(folder: Path, prefix: str) -> ImageSet | None:
    """Images and labels of Fashion-MNIST's "train" or "t10k"; None when a file is missing.

    Raises: DataError naming the file when one is damaged, or images and labels do not match.
    """
    image_path = find_idx(folder, f"{prefix}-images-idx3-ubyte")
    label_path = find_idx(folder, f"{prefix}-labels-idx1-ubyte")
    if image_path is None or label_path is None:
        return None
    return _fashion_set(read_idx(image_path), read_idx(label_path), image_path, label_path)


def _fashion_set(
    images: NDArray[Any], labels: NDArray[Any], image_path: Path, label_path: Path
) -> ImageSet:
    """Images and labels of Fashion-MNIST; DataError naming the file in which they are not that."""
    if images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise DataError(
            f"{image_path} must hold images of 28 x 28 pixels, has {images.shape} of {images.dtype}"
        )
    if labels.shape != images.shape[:1] or not len(labels) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{label_path} must hold a class for each of {len(images)} images, "
            f"has {labels.shape} of {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= 10:
        odd = int(np.argmax((labels < 0) | (labels >= 10)))
        raise DataError(
            f"{label_path} must hold a class in 0 ... 9 for each image, "
            f"has {labels[odd]} for image {odd}"
        )
    return ImageSet(images[:, None], labels.astype(np.int64))


def read_fashion_mini(path: Path) -> tuple[ImageSet, ImageSet]:
    """The shipped part of Fashion-MNIST; DataError naming the file when it is damaged."""
    with _advising("reinstall dist_graft"):
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                train, test = (
                    _fashion_set(file[f"{part}_images"], file[f"{part}_labels"], path, path)
                    for part in ("train", "test")
                )
        except _NPZ_ERRORS as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return train, test


def _read_fashion_mnist(root: str) -> tuple[ImageSet, ImageSet]:
    folder = fashion_folder(root)
    command = f"run dist-graft prepare fashion-mnist --root {root}"
    with _advising(f"remove it and {command}"):
        train, test = read_fashion_split(folder, "train"), read_fashion_split(folder, "t10k")
    if train is None or test is None:
        raise DataError(f"{folder} does not hold Fashion-MNIST: {command}")
    return train, test


def open_cifar(name: str, root: str, *, train: bool, download: bool) -> Any:
    """Open torchvision's data set object of cifar10 or cifar100.

    Raises: DataError naming the folder or the file in it that is missing or damaged and is not,
    or cannot be, downloaded.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path(root) / CIFAR_FOLDERS[name]
    try:
        with warnings.catch_warnings():
            # the published pickles spell a dtype in a way that numpy 2.4 deprecates
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            return kind(root, train=train, download=download)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        if download:
            advice = f"and cannot be downloaded ({error}): put torchvision's files there"
        else:
            advice = f"run dist-graft prepare {name} --root {root}, or set data.download"
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        paths = (folder / name for name, md5 in files if not check_integrity(folder / name, md5))
        first = next(paths, folder) if folder.is_dir() else folder
        raise DataError(f"{first} is missing or damaged, {advice}") from error


def _read_cifar(name: str, root: str, *, train: bool) -> ImageSet:
    content = open_cifar(name, root, train=train, download=False)
    images = np.ascontiguousarray(content.data.transpose(0, 3, 1, 2))
    return ImageSet(images, np.array(content.targets, dtype=np.int64))
