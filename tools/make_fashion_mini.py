"""Create fashion-mini, the subset of Fashion-MNIST that ships with dist_graft.

    python tools/make_fashion_mini.py FOLDER OUT.npz

FOLDER holds the four idx files, plain or gzipped (ROOT/FashionMNIST/raw, or those of Debian's
dataset-fashion-mnist). The selection is seeded: the same files give the same arrays, and with the
same zlib the same bytes.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_graft.errors import DataError
from dist_graft.training.data.sources import ImageSet, read_fashion_split

PER_CLASS = {"train": 500, "t10k": 200}
SEED = 2017


def choose(labels: NDArray[np.int64], per_class: int, random: np.random.RandomState) -> list[int]:
    """Shuffled indices of per_class images of each of the ten classes."""
    chosen = [random.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(10)]
    return [int(index) for index in random.permutation(np.concatenate(chosen))]


def mini(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Select the subset: images uint8 [n, 28, 28] and labels uint8 [n] for train and test."""
    random = np.random.RandomState(SEED)  # the stream of this generator never changes
    arrays: dict[str, NDArray[np.uint8]] = {}
    for (prefix, per_class), part in zip(PER_CLASS.items(), ("train", "test"), strict=True):
        full: ImageSet | None = read_fashion_split(folder, prefix)
        if full is None:
            raise DataError(f"{folder} does not contain the four idx files of Fashion-MNIST")
        indices = choose(full.labels, per_class, random)
        arrays[f"{part}_images"] = full.images[indices, 0]
        arrays[f"{part}_labels"] = full.labels[indices].astype(np.uint8)
    return arrays


def save(arrays: dict[str, NDArray[np.uint8]], path: Path) -> None:
    """Write a compressed npz file; its bytes depend on the arrays and zlib only."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main() -> None:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the four idx files")
    parser.add_argument("out", type=Path, help="npz file to write")
    arguments = parser.parse_args()
    save(mini(arguments.folder), arguments.out)


if __name__ == "__main__":
    main()
