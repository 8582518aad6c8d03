from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from launching import is_alive, told_by_kernel

# A shared machine is slow at times: no example has a deadline, and no speed is a failure.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
# Looks for what the suite has not found: pytest tests/property --hypothesis-profile explore
settings.register_profile(
    "explore", settings.get_profile("suite"), derandomize=False, max_examples=2000
)
settings.load_profile("suite")


_status = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End without finalizing: threads that still wait in a silent store would abort it (ADR 20)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _status in config.stash:
        os._exit(config.stash[_status])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that may take longest first: else they come last, and the other cores wait for them."""
    items.sort(key=_longest, reverse=True)  # keeps the order of equals


def _longest(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


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
    """Running child processes, without multiprocessing's own servers, which live on."""
    children = {f"{child.pid} {child.name}" for child in multiprocessing.active_children()}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in told_by_kernel(listing).split():
            command = _command(Path("/proc") / pid)
            if command and "from multiprocessing." not in command:
                children.add(f"{pid} {command}")
    return children


def _command(process: Path) -> str:
    """Command line of a process; nothing when it has ended, waited for or not."""
    while not (command := told_by_kernel(process / "cmdline")):  # empty also while it starts
        if not is_alive(int(process.name)):
            break
    return command.replace("\0", " ").strip()
