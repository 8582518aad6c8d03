"""Read the small image datasets into uint8 arrays."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import http.client
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_graft.config.validation import own
from dist_graft.errors import DataError, user_code
from dist_graft.references import is_reference

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma (ITU-R BT.601)."""

FASHION_MINI = Path(__file__).parent / "fashion_mini" / "fashion_mini.npz"
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""Folders of CIFAR in data.root, as torchvision names them."""

_NPZ_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError),
    *(TypeError, zipfile.BadZipFile, zlib.error),
)
"""Errors of numpy and zipfile for a damaged npz file."""


@dataclass(frozen=True)
class ImageSet:
    """Images (uint8 [n, channels, side, side]) and their classes (int64 [n], from 0)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Number of classes, and mean and standard deviation per channel of pixels in [0, 1]."""

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes; empty: they have none."""

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation after conversion to 1 or 3 channels.

        For grayscale both are the luma of the RGB values, which is exact for the standard deviation
        only if the channels are perfectly correlated.
        """
        return _as_channels(self.mean, channels), _as_channels(self.std, channels)


_FASHION = DatasetInfo(
    num_classes=10,
    mean=(0.2860,),
    std=(0.3530,),
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
)
DATASET_INFO = {
    "fashion-mini": _FASHION,
    "fashion-mnist": _FASHION,
    "cifar10": DatasetInfo(
        num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": DatasetInfo(
        num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
}


def _as_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if channels == 3:
        return values * 3
    return (sum(value * weight for value, weight in zip(values, LUMA, strict=True)),)


def read_small(name: str, root: str) -> tuple[ImageSet, ImageSet, DatasetInfo]:
    """Training and test images of a small dataset, and its statistics.

    Raises: DataError if it is missing or damaged; ConfigError if a user-defined function does not
        exist.
    """
    if is_reference(name):
        return read_custom(name, root)
    if name == "fashion-mini":
        return *read_fashion_mini(FASHION_MINI), DATASET_INFO[name]
    if name == "fashion-mnist":
        return *_read_fashion_mnist(root), DATASET_INFO[name]
    (train, classes), (test, _) = (_read_cifar(name, root, train=train) for train in (True, False))
    return train, test, replace(DATASET_INFO[name], classes=classes)


@contextlib.contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Append advice to the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; {advice}") from error


def fashion_folder(root: str) -> Path:
    """Folder of Fashion-MNIST's idx files in data.root (torchvision's layout)."""
    return Path(root) / "FashionMNIST" / "raw"


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if its name ends in .gz; DataError if that fails."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of bytes, decompressed if its name ends in .gz.

    Raises: DataError naming the file if it cannot be read or its length contradicts its header.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header says {math.prod(shape)} bytes of data, "
            f"got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def find_idx(folder: Path, name: str) -> Path | None:
    """Path of an idx file in a folder, plain or gzipped; None if there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_fashion_split(folder: Path, prefix: str) -> ImageSet | None:
    """Images and labels of Fashion-MNIST's "train" or "t10k"; None if a file is missing.

    Raises: DataError naming the file if one is damaged or the two do not match.
    """
    image_path = find_idx(folder, f"{prefix}-images-idx3-ubyte")
    label_path = find_idx(folder, f"{prefix}-labels-idx1-ubyte")
    if image_path is None or label_path is None:
        return None
    return _fashion_set(read_idx(image_path), read_idx(label_path), image_path, label_path)


def _fashion_set(
    images: NDArray[Any], labels: NDArray[Any], image_path: Path, label_path: Path
) -> ImageSet:
    """Validate the arrays of a Fashion-MNIST split; DataError naming the invalid file."""
    if images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise DataError(
            f"{image_path} must contain uint8 images of 28 x 28 pixels, got {images.dtype} "
            f"{images.shape}"
        )
    if labels.shape != images.shape[:1] or not len(labels) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{label_path} must contain a class for each of {len(images)} images, "
            f"got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= 10:
        index = int(np.argmax((labels < 0) | (labels >= 10)))
        raise DataError(
            f"{label_path} must contain classes in 0 ... 9, got {labels[index]} for image {index}"
        )
    return ImageSet(images[:, None], labels.astype(np.int64))


def read_fashion_mini(path: Path) -> tuple[ImageSet, ImageSet]:
    """Read the shipped subset of Fashion-MNIST; DataError naming the file if it is damaged."""
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
        raise DataError(f"{folder} does not contain Fashion-MNIST: {command}")
    return train, test


def ensure_cifar(name: str, root: str, *, download: bool) -> None:
    """Download cifar10 or cifar100 if it is missing, unless another process has just done so.

    Raises: DataError as `open_cifar` does.
    """
    try:
        open_cifar(name, root, train=True, download=False)
    except DataError:
        if not download:
            raise
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a disk without locks
                Path(root).mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((Path(root) / f".{name}.lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            open_cifar(name, root, train=True, download=True)


def open_cifar(name: str, root: str, *, train: bool, download: bool) -> Any:
    """Open cifar10 or cifar100 as a torchvision dataset.

    Raises: DataError naming the missing or damaged folder or file, if it is not or cannot be
    downloaded.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path(root) / CIFAR_FOLDERS[name]
    try:
        with warnings.catch_warnings():
            # The published pickles use a dtype spelling that NumPy 2.4 deprecates.
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


def _read_cifar(name: str, root: str, *, train: bool) -> tuple[ImageSet, tuple[str, ...]]:
    """Images of a split, and the names of the classes."""
    content = open_cifar(name, root, train=train, download=False)
    images = np.ascontiguousarray(content.data.transpose(0, 3, 1, 2))
    labels = np.array(content.targets, dtype=np.int64)
    return ImageSet(images, labels), tuple(content.classes)


def read_custom(reference: str, root: str) -> tuple[ImageSet, ImageSet, DatasetInfo]:
    """Call the function "package.module:name" with data.root.

    It returns ((images, labels), (images, labels)) for training and testing: images uint8
    [n, 1 or 3, side, side], labels integers [n] from 0. Mean and standard deviation are computed
    from the training images.

    Raises: ConfigError if there is no such function; DataError if it returns anything else.
    """
    function = own("data.name", reference)
    with user_code(f"data.name {reference}"):
        returned = function(root)
    try:
        train, test = (_image_set(reference, *part) for part in returned)
    except TypeError as error:
        raise DataError(
            f"{reference} must return ((images, labels), (images, labels)): {error}"
        ) from error
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{reference}: training and test images differ in shape")
    pixels = train.images / np.float32(255)
    return (
        train,
        test,
        DatasetInfo(
            num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
            mean=tuple(pixels.mean(axis=(0, 2, 3)).tolist()),
            std=tuple(np.maximum(pixels.std(axis=(0, 2, 3)), 1e-6).tolist()),
        ),
    )


def _image_set(reference: str, images: Any, labels: Any) -> ImageSet:
    pixels: NDArray[Any] = np.ascontiguousarray(images)
    classes: NDArray[Any] = np.asarray(labels)
    shape = pixels.shape
    square = len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3]
    if pixels.dtype != np.uint8 or not square or not len(pixels):
        raise DataError(
            f"{reference} must return images as uint8 [n, 1 or 3, side, side], got "
            f"{pixels.dtype} {list(shape)}"
        )
    if classes.dtype.kind not in "iu" or classes.shape != shape[:1] or classes.min() < 0:
        raise DataError(
            f"{reference} must return a non-negative class for each of {len(pixels)} images, got "
            f"{classes.dtype} {list(classes.shape)}"
        )
    return ImageSet(pixels, classes.astype(np.int64))
