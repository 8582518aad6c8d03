"""Random faults: a short run of the benchmark benchmarks/chaos.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import run_program

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
FAULTS = 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fault_is_recovered_with_equal_weights() -> None:
    options = ("--faults", str(FAULTS), "--seed", "2", "--pause", "2", "--epochs", "6")
    done = run_program([sys.executable, str(CHAOS), *options], timeout=590)
    assert done.status == 0, done
    assert f"faults: {FAULTS}, recoveries: {FAULTS}" in done.output, done
    verdicts = re.findall(r": (ok|missed)$", done.output, re.MULTILINE)
    assert verdicts == ["ok"] * 4, done.output
