"""Looks at a run once, or again and again until it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dist_graft.analysis.status.judging import UNDER_WAY, judge
from dist_graft.analysis.status.reading import read_run
from dist_graft.analysis.status.showing import as_json, as_text

_CLEAR = "\x1b[H\x1b[2J"


def look(path: Path, *, as_numbers: bool, watch: bool, every: float) -> Iterator[str]:
    """What is to be printed: one text, or one every few seconds while the run goes on.

    Raises: RunDirectoryError when there is no run.
    """
    clear = _CLEAR if watch and not as_numbers and sys.stdout.isatty() else ""
    while True:
        run, now = read_run(path), time.time()
        verdict = judge(run, now)
        if as_numbers:
            yield as_json(run, verdict, now, indent=None if watch else 1)
        else:
            yield clear + as_text(run, verdict, now)
        if not watch or verdict.state not in UNDER_WAY:
            return
        time.sleep(every)
