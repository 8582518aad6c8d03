"""Operating system services for a process of a run: signals, memory, parent death, exit."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dist_graft.errors import StoppedAtStartError, StoppedError
from dist_graft.printing import flush_all

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a run to stop; SIGHUP unless it is ignored (nohup)."""
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
_NEVER = 2**31 - 1
_LARGEST = 32 << 20  # threshold that malloc accepts


def die_with_launcher(launcher: int | None = None) -> None:
    """Have the kernel kill this process when its launcher dies (Linux only; ADR 20).

    Otherwise orphaned processes could interfere with a restarted run.

    Args:
        launcher: process id; None: the current parent.
    """
    launcher = launcher or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # the launcher died before the line above
        os._exit(1)


def has_ended(pid: int) -> bool:
    """Whether a process of this user has ended; true for a zombie."""
    try:
        os.kill(pid, 0)
        state = _state(pid)
        if not state:  # there is no /proc, or the process has just disappeared from it
            os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # reused by another user's process
        return True
    return state[:1] in (["Z"], ["X"])


def process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks; None if it has ended (or there is no /proc)."""
    fields = _state(pid)
    return None if not fields or fields[0] in "ZX" else fields[19]


def _state(pid: int) -> list[str]:
    """State of a process and what follows in /proc/PID/stat; empty without that file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # no /proc, or the process has just ended
        return []


def keep_freed_memory() -> None:
    """Have malloc keep freed memory (glibc) instead of returning it to the system.

    Every training step on a CPU allocates and frees the same activations. By default their pages
    are unmapped, mapped again and zeroed in every step, which takes up to a sixth of its time.
    Thresholds that the environment sets are not changed.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def stop_on_signals(*, at_start: bool = False) -> None:
    """Raise StoppedError in the main thread at the first signal that asks to stop.

    Args: at_start: raise StoppedAtStartError instead.
    """

    def stop(number: int, _: FrameType | None) -> None:
        ignore_signals()
        if at_start:
            raise StoppedAtStartError.by(signal.Signals(number))
        raise StoppedError(f"stopped by {signal.Signals(number).name}; rerun the command to resume")

    handle_signals(stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher blocks SIGINT at first


def not_ignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals, without SIGHUP if it is ignored, as under nohup.

    Others are handled in any case: shells ignore SIGINT in background jobs of a script.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in signals if number != signal.SIGHUP or not ignored]


def handle_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle the signals that ask a run to stop. Under nohup, SIGHUP stays ignored."""
    for number in not_ignored(SIGNALS):
        signal.signal(number, handler)


def communicate_on_loopback() -> None:
    """Have gloo and NCCL listen on the loopback interface, unless the environment names another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def ignore_signals() -> None:
    """Ignore the signals that ask a run to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def terminate_launcher(restarts: int) -> None:
    """Send SIGTERM to a torchrun that would otherwise restart a run that was asked to stop.

    Args: restarts: number of times that it has restarted the processes.
    """
    if restarts < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        os.kill(os.getppid(), signal.SIGTERM)


def report_failure(
    message: str, *, exit_status: int = 1, traceback: str = "", **details: object
) -> None:
    """Write the launcher's error file, if it asked for one (``TORCHELASTIC_ERROR_FILE``).

    torchrun shows the message in its table of failures; `launch` raises it.

    Args:
        message: one line.
        exit_status: exit status of this process.
        traceback: formatted traceback.
        details: further entries of the file, which must be serializable as JSON.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    now = time.time()
    extra = {"timestamp": int(now), "py_callstack": traceback or message}
    content = {"message": message, "extraInfo": extra, "errorCode": exit_status}
    partial = Path(f"{file}.partial")
    with contextlib.suppress(OSError):  # a full disk: the message is on standard error, too
        partial.write_text(
            json.dumps({"message": content, "time": now, "traceback": traceback, **details})
        )
        partial.replace(file)


def leave(status: int) -> NoReturn:
    """End the process at once, without finalizing the interpreter (ADR 20).

    Destroying a process group whose peers are gone can hang, and a thread that releases a tensor
    during finalization (of gloo or the checkpoint writer) aborts the process.
    """
    flush_all()
    os._exit(status)
