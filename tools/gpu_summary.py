"""Combine the results of launch/gpu_check.sh: OUT/gpu.json, and OUT/summary.txt, which is printed.

python tools/gpu_summary.py OUT
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

MESSAGE = 300


def read_tests(path: Path) -> dict[str, Any] | None:
    """Numbers of tests by outcome, and the first line of each failure; None without a report."""
    if not path.exists():
        return None
    outcomes: Counter[str] = Counter()
    failures = {}
    for case in ET.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found = [each for each in case if each.tag in ("failure", "error", "skipped")]
        outcomes[found[0].tag if found else "passed"] += 1
        if found and found[0].tag != "skipped":
            failures[name] = (found[0].get("message") or "").strip()[:MESSAGE]
    return {"outcomes": dict(outcomes), "failures": failures}


def main(out: Path) -> int:
    """Write both files; the exit status is 0 if there is a result."""
    tests = read_tests(out / "tests.xml")
    figures = out / "benchmarks.json"
    benchmarks = json.loads(figures.read_text()) if figures.exists() else None
    (out / "gpu.json").write_text(
        json.dumps({"tests": tests, "benchmarks": benchmarks}, indent=1) + "\n"
    )
    lines = ["tests: no report (not run, or out of time: see tests.log)"]
    if tests:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(tests["outcomes"].items()))
        log = (out / "tests.log").read_text()
        lines = [f"tests: {counts}{', then out of time' if 'KeyboardInterrupt' in log else ''}"]
        lines += [f"  {name}: {' '.join(text.split())}" for name, text in tests["failures"].items()]
    log = out / "benchmarks.log"
    lines += log.read_text().splitlines() if log.exists() else ["benchmarks: not run"]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(tests is None and benchmarks is None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
