"""Memory settings of a training process, and processes that end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dist_graft.population.runtime import process
from dist_graft.population.runtime.process import has_ended

FAULTS = """
import resource
from dist_graft.population.runtime.process import keep_freed_memory
import torch

def step():
    parts = [torch.ones(1 << 20) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""
PAGES = 10 * 8 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
"""Pages that ten steps allocate."""


@pytest.mark.parametrize(
    ("thresholds", "is_returned"), [({}, False), ({"TRIM": "131072", "MMAP": "65536"}, True)]
)
def test_freed_memory_is_kept_unless_the_environment_sets_thresholds(
    thresholds: dict[str, str], is_returned: bool
) -> None:
    variables = {f"MALLOC_{name}_THRESHOLD_": value for name, value in thresholds.items()}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    pages = int(done.stdout)
    assert pages > PAGES / 2 if is_returned else pages < PAGES / 20


@pytest.mark.parametrize("disappears", [False, True])
def test_a_process_that_ended_before_its_parent_waited(
    disappears: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `disappears`, its parent waits right after the first look at it."""
    child = subprocess.Popen(["sleep", "600"])
    assert not has_ended(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    look = process._state

    def look_late(pid: int) -> list[str]:
        child.wait()
        return look(pid)

    if disappears:
        monkeypatch.setattr(process, "_state", look_late)
    assert has_ended(child.pid)
    child.wait()
    assert has_ended(child.pid)
