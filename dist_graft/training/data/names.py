"""Names of the datasets, checked without importing torch."""

from __future__ import annotations

import difflib

from dist_graft.errors import ConfigError
from dist_graft.references import is_reference

DATASETS = ("fashion-mini", "fashion-mnist", "cifar10", "cifar100", "imagefolder")


def dataset_names() -> list[str]:
    """Built-in values of data.name; the first one ships with the package."""
    return list(DATASETS)


def check_dataset_name(name: str) -> None:
    """Raise ConfigError with similar and legal names if no dataset has this name.

    A "package.module:name" passes; it is imported later.
    """
    if name in DATASETS or is_reference(name):
        return
    near = difflib.get_close_matches(name, DATASETS, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(f"data.name must be one of {', '.join(DATASETS)}, got {name!r}{hint}")
