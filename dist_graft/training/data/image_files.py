"""Names and classes of the image files in class folders, as arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from dist_graft.errors import DataError
from dist_graft.training.data.decoding import display_path


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFiles:
    """Paths and classes of images, round-robin over the classes.

    A sequence of (path, class) pairs that takes 14 bytes per image, plus its name. Arrays, because
    each loader worker would copy the memory pages of Python objects that it uses.
    """

    folder: Path
    classes: list[str]
    """Names of the class folders, sorted; a class is an index of this list."""
    names: bytes
    """Paths relative to the class folder, one after the other; they need not be UTF-8."""
    starts: NDArray[np.int64]
    """[n] position of each name in `names`."""
    lengths: NDArray[np.uint16]
    """[n] length of each name."""
    labels: NDArray[np.int32]
    """[n] class of each image."""

    @classmethod
    def of_classes(cls, folder: Path, classes: Iterable[tuple[str, Iterable[str]]]) -> ImageFiles:
        """Arrange the images of the classes, given as (class folder, names in it) pairs."""
        found, blob, lengths = [], bytearray(), []
        for name, group in classes:
            names = [os.fsencode(path) for path in group]
            found.append(name)
            blob += b"".join(names)
            lengths.append(np.fromiter(map(len, names), np.uint16, len(names)))
        counts = [len(group) for group in lengths]
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        order = np.lexsort((labels, ranks))
        sizes = np.concatenate(lengths)
        starts = sizes.cumsum(dtype=np.int64) - sizes.astype(np.int64)
        return cls(
            folder=folder,
            classes=found,
            names=bytes(blob),
            starts=starts[order],
            lengths=sizes[order],
            labels=labels[order],
        )

    @classmethod
    def read(cls, folder: Path) -> ImageFiles:
        """List the images below folder/CLASS/, as `torchvision.datasets.ImageFolder` does.

        Raises: DataError if the folder or its classes are missing, or a class has no images.
        """
        if not folder.is_dir():
            raise DataError(f"{folder} is missing: imagefolder needs train/CLASS/* and val/CLASS/*")
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not classes:
            raise DataError(f"{folder} has no class folders: imagefolder needs one per class")
        files = cls.of_classes(folder, ((name, image_names(folder / name)) for name in classes))
        counts = np.bincount(files.labels, minlength=len(classes))
        if not counts.all():
            raise DataError(
                f"{display_path(folder / classes[int(counts.argmin())])} has no images "
                f"({', '.join(IMG_EXTENSIONS)}): add some or remove the folder"
            )
        return files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        start, label = int(self.starts[index]), int(self.labels[index])
        name = os.fsdecode(self.names[start : start + int(self.lengths[index])])
        return self.folder / self.classes[label] / name, label


def image_names(folder: Path) -> Iterator[str]:
    """Paths of the images below a folder, relative to it."""
    for path, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield f"{path}/{name}".removeprefix(f"{folder}/")
