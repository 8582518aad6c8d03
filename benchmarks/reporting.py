"""Output shared by all benchmarks: hardware and versions, spreads, one line per target."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """CPU, load and versions, in one line."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{_cpu_name()}, {cores} cores, load {load:.1f} at the start (other programs affect wall "
        f"times); torch {version('torch')}, Python {platform.python_version()}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format median and range: "1.12 (1.08..1.31)"."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def verdict(
    name: str, values: Sequence[float], *, at_most: float | None = None, at_least: float = 0.0
) -> str:
    """Compare the median with one target: "NAME: MEDIAN (...): ok" or "missed"."""
    median = statistics.median(values)
    met = median >= at_least if at_most is None else median <= at_most
    target = f">= {at_least:g}" if at_most is None else f"<= {at_most:g}"
    measured = f"{min(values):.3g}..{max(values):.3g}, n = {len(values)}"
    return f"{name}: {median:.3g} ({measured}; target {target}): {'ok' if met else 'missed'}"


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Divide repetition by repetition, so that a slow phase of the machine affects both sides."""
    return [value / base for value, base in zip(values, reference, strict=True)]
