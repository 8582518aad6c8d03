"""The program: python -m dist_graft, and the console script dist-graft."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end the process with its status."""
    from dist_graft.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
