"""Wall time of `dist-graft --help`.

python benchmarks/help.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from reporting import machine, spread, verdict

from dist_graft.printing import format_table

TARGET_SECONDS = 1.0


def program() -> list[str]:
    """Return the console script next to this Python, or else the module."""
    script = Path(sys.executable).with_name("dist-graft")
    return [str(script)] if script.exists() else [sys.executable, "-m", "dist_graft"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    commands = {
        "dist-graft --help": [*program(), "--help"],
        "dist-graft train --help": [*program(), "train", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    print(machine())
    print(f"n = {options.repetitions} of each, interleaved, after one warm-up of each")
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for repetition in range(options.repetitions + 1):
        for name, command in commands.items():
            wall = seconds(command)
            if repetition:
                taken[name].append(wall)
    print(format_table(("", "seconds"), [(name, spread(walls)) for name, walls in taken.items()]))
    print(verdict("seconds help", taken["dist-graft --help"], at_most=TARGET_SECONDS))


if __name__ == "__main__":
    main()
