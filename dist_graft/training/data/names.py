"""The names of the data sets, checkable before anything heavy is imported."""

from __future__ import annotations

import difflib

from dist_graft.errors import ConfigError
from dist_graft.references import is_reference

DATASETS = ("fashion-mini", "fashion-mnist", "cifar10", "cifar100", "imagefolder")


def dataset_names() -> list[str]:
    """Names that data.name may have, the shipped set first."""
    return list(DATASETS)


def check_dataset_name(name: str) -> None:
    """Raise ConfigError, with near names and all legal ones, when no data set has this name.

    A reference to a function of the user's is looked up later.
    """
    if name in DATASETS or is_reference(name):
        return
    near = difflib.get_close_matches(name, DATASETS, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(f"data.name must be one of {', '.join(DATASETS)}, got {name!r}{hint}")
