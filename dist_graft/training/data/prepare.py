"""The `prepare` command: unpack or download a dataset into data.root."""

from __future__ import annotations

import http.client
import tempfile
from pathlib import Path

from dist_graft.errors import DataError
from dist_graft.references import is_reference
from dist_graft.training.data import check_dataset_name
from dist_graft.training.data.sources import (
    CIFAR_FOLDERS,
    FASHION_MINI,
    ensure_cifar,
    fashion_folder,
    find_idx,
    read_bytes,
    read_fashion_split,
)

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Gzipped files of Debian's package dataset-fashion-mnist."""

FASHION_COUNTS = {"train": 60_000, "t10k": 10_000}
FASHION_FILES = tuple(
    f"{prefix}-{kind}"
    for prefix in FASHION_COUNTS
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)

_ADVICE = "install Debian's package dataset-fashion-mnist, or pass --source DIR"


def prepare(name: str, *, root: str, source: str | None = None) -> str:
    """Install a dataset in root, unless it is already there and intact.

    Args: source: folder with Fashion-MNIST's four idx files, gzipped or not. None: Debian's
    dataset-fashion-mnist if installed, otherwise a download.
    Returns: one line for the user.
    Raises: ConfigError for an unknown name; DataError if there is no source, the download fails, or
    a file is damaged.
    """
    check_dataset_name(name)
    if is_reference(name):
        return f"{name} is user-defined: training calls it with {root}"
    if name == "fashion-mini":
        return f"fashion-mini ships with dist_graft: {FASHION_MINI}"
    if name == "imagefolder":
        return f"imagefolder reads your images from {root}/train/CLASS/* and {root}/val/CLASS/*"
    if name == "fashion-mnist":
        return _prepare_fashion_mnist(root, source)
    ensure_cifar(name, root, download=True)
    return f"{name} is in {Path(root) / CIFAR_FOLDERS[name]}"


def _prepare_fashion_mnist(root: str, source: str | None) -> str:
    folder = fashion_folder(root)
    try:
        _verify(folder)
    except DataError:  # missing or damaged
        if source is None and not DEBIAN_FASHION.is_dir():
            _download(root)
        else:
            _unpack(DEBIAN_FASHION if source is None else Path(source), folder)
        _verify(folder)
    return f"fashion-mnist (60,000 training and 10,000 test images) is in {folder}"


def _verify(folder: Path) -> None:
    """Raise DataError if a file is missing, damaged, or has the wrong number of images."""
    for prefix, count in FASHION_COUNTS.items():
        split = read_fashion_split(folder, prefix)
        if split is None:
            raise DataError(f"{folder} does not contain Fashion-MNIST's four idx files: {_ADVICE}")
        if len(split.images) != count:
            raise DataError(
                f"{folder} must contain {count} images in {prefix}-images-idx3-ubyte, "
                f"got {len(split.images)}"
            )


def _unpack(origin: Path, folder: Path) -> None:
    _verify(origin)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            for name in FASHION_FILES:
                path = find_idx(origin, name)
                assert path is not None
                unpacked = Path(part) / name
                unpacked.write_bytes(read_bytes(path))
                unpacked.replace(folder / name)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error


def _download(root: str) -> None:
    from torchvision import datasets

    try:
        datasets.FashionMNIST(root, download=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise DataError(f"Fashion-MNIST cannot be downloaded ({error}): {_ADVICE}") from error
