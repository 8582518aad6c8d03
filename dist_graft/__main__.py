"""Entry point: ``python -m dist_graft`` and the console script ``dist-graft``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from dist_graft.cli import run

    status = run(sys.argv[1:])
    if sys.argv[1:2] == ["train"]:
        from dist_graft.population.runtime.process import leave

        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
