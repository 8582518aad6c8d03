from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from launching import is_alive, read_proc

# No deadlines: a shared machine may be slow, and slowness is not a failure.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
# Searches further than the suite: pytest tests/property --hypothesis-profile explore
settings.register_profile(
    "explore", settings.get_profile("suite"), derandomize=False, max_examples=2000
)
# For another environment, where the suite has run in the first: .ci/run, oldest versions
settings.register_profile("brief", settings.get_profile("suite"), max_examples=10)
settings.load_profile("suite")


_status = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Exit without finalizing: threads that wait for a dead store abort it (ADR 20)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _status in config.stash:
        os._exit(config.stash[_status])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first; otherwise the other cores wait for them at the end."""
    items.sort(key=_longest, reverse=True)  # stable


def _longest(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: launch/gpu_check.sh")


@pytest.fixture
def store():
    """A key-value store for processes or threads of this machine."""
    import torch.distributed as dist

    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


@pytest.fixture(autouse=True)
def _restored_signal_handlers():
    """Restore the handlers that a training in this process has left: other tests inherit them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """Fail a test that leaks a process group or a child process."""
    before = _children()
    yield
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        assert not (dist.is_available() and dist.is_initialized()), "a process group leaked"
    leaked = _children() - before
    assert not leaked, f"child processes leaked: {sorted(leaked)}"


def _children() -> set[str]:
    """Return the running child processes, except for multiprocessing's own servers."""
    children = {f"{child.pid} {child.name}" for child in multiprocessing.active_children()}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in read_proc(listing).split():
            command = _command(Path("/proc") / pid)
            if command and "from multiprocessing." not in command:
                children.add(f"{pid} {command}")
    return children


def _command(process: Path) -> str:
    """Return the command line of a process; empty if it has exited or is a zombie."""
    while not (command := read_proc(process / "cmdline")):  # also empty while it starts
        if not is_alive(int(process.name)):
            break
    return command.replace("\0", " ").strip()
