"""Progress on a terminal, and tables of the population as text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from tqdm import tqdm

Row = Sequence[str]


def table(header: Row, rows: Sequence[Row]) -> str:
    """Columns aligned to the right, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    )


def progress_bar(
    mode: Literal["auto", "bar", "lines"], *, steps: int, epoch: int, epochs: int
) -> tqdm[Any] | None:
    """A bar over an epoch's steps; None where lines are wanted instead (a log, a pipe)."""
    if mode == "lines" or (mode == "auto" and not sys.stderr.isatty()):
        return None
    return tqdm(
        total=steps,
        desc=f"epoch {epoch + 1}/{epochs}",
        unit="step",
        leave=False,
        dynamic_ncols=True,
    )
