"""Further measurements of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_graft.studies.controls import Run

MEASURED: Mapping[str, str] = {}
"""Columns of results.csv that `measure` fills, with their dtypes."""


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Return the measurements of a finished run by column; what was not measured is absent."""
    del folder, run
    return {}
