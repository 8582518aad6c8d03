"""Words on a standard stream whose reader may be gone: that is no reason to end a run."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def tell(text: object, stream: TextIO | None = None) -> None:
    """Print a line at once, on standard error if no stream is named; or nowhere.

    A closed pipe, a terminal that has hung up and a full disk are passed over.
    """
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)


def flush_all() -> None:
    """Write out what both streams hold back, as far as that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
