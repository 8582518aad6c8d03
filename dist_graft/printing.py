"""Printing that tolerates closed pipes, and tables and numbers as text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO


def print_line(text: object, stream: TextIO | None = None) -> None:
    """Print a line and flush it, by default to standard error.

    The line and its end are one write, so that processes that share a pipe, as under torchrun, do
    not mix their lines. A closed pipe or terminal and a full disk are ignored.
    """
    with contextlib.suppress(OSError):
        print(f"{printable(text)}\n", end="", file=stream or sys.stderr, flush=True)


def printable(text: object) -> str:
    """The text with escapes for what is not valid Unicode, such as bytes of a file name."""
    return str(text).encode(errors="backslashreplace").decode()


def flush_all() -> None:
    """Flush standard output and standard error, ignoring what cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with right-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    )


def format_bytes(size: float) -> str:
    """Format a number of bytes with three significant digits and a decimal unit, as in 1.23 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            digits = 0 if size >= 100 * unit else 1 if size >= 10 * unit else 2
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} B"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    table = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def format_number(value: float | None, digits: int = 2) -> str:
    """Format a number that may be missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_metric(value: object, metric: str) -> str:
    """Format a result: accuracies with 2 decimals, others with 4 significant digits."""
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.2f}" if metric == "accuracy" else f"{value:.4g}"


def metric_header(metric: str) -> str:
    """Header of a column of a metric: % for accuracies, otherwise its name."""
    return "%" if metric == "accuracy" else metric
