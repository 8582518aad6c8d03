"""Compares the classes of the data with those that a run was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import zip_longest

from dist_graft.errors import DataError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints, job_checkpoints
from dist_graft.training.data import Data, ImageData

_LONGEST = 100
"""Characters of a list of classes that is shown in full."""


def refuse_other_classes(directory: RunDirectory, data: Data, root: str) -> None:
    """Refuse image data whose classes are not those that the networks of a run were trained on.

    A run without a checkpoint, or without classes.json (older versions), is not checked.

    Args:
        directory: of the run.
        data: to train or test with.
        root: folder of the data, for the error.

    Raises: DataError naming both lists of classes; RunDirectoryError if classes.json is damaged.
    """
    if not isinstance(data, ImageData):
        return
    before = directory.read_classes()
    if before is None or before == list(data.classes):
        return
    if complete_checkpoints(directory.checkpoints) or job_checkpoints(directory.path):
        raise DataError(
            f"{_printable(root)} has {_difference(data.classes, before)}: pass the root of the "
            "same data"
        )


def _difference(classes: Sequence[str], before: Sequence[str]) -> str:
    now, then = (", ".join(map(_printable, names)) for names in (classes, before))
    if max(len(now), len(then)) <= _LONGEST:
        return f"the classes {now}, but the run was trained on {then}"
    pairs = zip_longest(classes, before, fillvalue="none")
    new, old = next((new, old) for new, old in pairs if new != old)
    return (
        f"{len(classes)} classes, but the run was trained on {len(before)}; the first that differs "
        f"is {_printable(new)}, which was {_printable(old)}"
    )


def _printable(name: str) -> str:
    """The name of a folder; bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")
