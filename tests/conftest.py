from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shared machine is slow at times: no example has a deadline, and no speed is a failure.
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """A test that leaves a process group or a child process behind fails."""
    before = _children()
    yield
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        assert not (dist.is_available() and dist.is_initialized()), "a process group leaked"
    leaked = _children() - before
    assert not leaked, f"child processes leaked: {sorted(leaked)}"


def _children() -> set[str]:
    """Child processes by id and command, without multiprocessing's own, which live on."""
    children = {f"{child.pid} {child.name}" for child in multiprocessing.active_children()}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in _text(listing).split():
            command = _text(Path("/proc") / pid / "cmdline").replace("\0", " ")
            if command and "from multiprocessing." not in command:
                children.add(f"{pid} {command}")
    return children


def _text(path: Path) -> str:
    """What the file says; nothing when its process or thread has ended since."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
