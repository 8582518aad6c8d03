"""Image datasets from a user-defined function."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_graft.config.validation import own
from dist_graft.errors import DataError
from dist_graft.training.data.sources import DatasetInfo, ImageSet


def read_custom(reference: str, root: str) -> tuple[ImageSet, ImageSet, DatasetInfo]:
    """Call the function "package.module:name" with data.root.

    It returns ((images, labels), (images, labels)) for training and testing: images uint8
    [n, 1 or 3, side, side], labels integers [n] from 0. Mean and standard deviation are computed
    from the training images.

    Raises: ConfigError if there is no such function; DataError if it returns anything else.
    """
    returned = own("data.name", reference)(root)
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
