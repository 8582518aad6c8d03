"""What all benchmarks print: the machine, a table, one line a target."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Where a run's numbers come from, in one line."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{_cpu_name()}, {cores} cores, load {load:.1f} at the start (other programs disturb wall "
        f"times); torch {version('torch')}, Python {platform.python_version()}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range: "1.12 (1.08..1.31)"."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first aligned to the left and the others to the right, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def verdict(
    name: str, values: Sequence[float], *, at_most: float | None = None, at_least: float = 0.0
) -> str:
    """The line of one target, which the median has to meet: "NAME: MEDIAN (...): ok" or missed."""
    median = statistics.median(values)
    met = median >= at_least if at_most is None else median <= at_most
    target = f">= {at_least:g}" if at_most is None else f"<= {at_most:g}"
    seen = f"{min(values):.3g}..{max(values):.3g}, n = {len(values)}"
    return f"{name}: {median:.3g} ({seen}; target {target}): {'ok' if met else 'missed'}"


def ratios(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Repetition by repetition, so that a slow moment of the machine hits both sides."""
    return [one / other for one, other in zip(ours, reference, strict=True)]
