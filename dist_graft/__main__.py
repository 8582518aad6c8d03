"""Entry point: ``python -m dist_graft`` and the console script ``dist-graft``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    _open_standard_streams()
    from dist_graft.cli import run

    status = run(sys.argv[1:])
    if sys.argv[1:2] == ["train"]:
        from dist_graft.population.runtime.process import leave

        leave(status)
    sys.exit(status)


def _open_standard_streams() -> None:
    """Replace streams that were closed at the start: output by nothing, errors by output.

    Otherwise Python has None for them, and the next file that is opened has their descriptor: torch
    would print its warnings into it.
    """
    if sys.stdout is None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.set_inheritable(1, True)  # dup2 does nothing if null is 1 already
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        os.dup2(1, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


if __name__ == "__main__":
    main()
