"""One process of a run: dies with its launcher, keeps its memory, stops on a signal, says why."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dist_graft.errors import StoppedError
from dist_graft.printing import flush_all

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks a run to stop."""
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
_NEVER = 2**31 - 1
_LARGEST = 32 << 20  # that malloc takes


def die_with_launcher(launcher: int | None = None) -> None:
    """Have the kernel kill this process when its launcher dies (Linux), so that none is orphaned.

    A run that is started again after its launcher was killed then never meets the old processes.

    Args:
        launcher: process id; None: the current parent.
    """
    launcher = launcher or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # the launcher died before the line above
        os._exit(1)


def has_ended(pid: int) -> bool:
    """Whether a process of this user has ended; also when its parent has not noticed yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # reused by another user's process
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # no /proc, or the process has just ended
        return False


def keep_freed_memory() -> None:
    """Have malloc keep what is freed (glibc) instead of handing it back to the system.

    Every step on a CPU allocates and frees the same activations. Else their pages go and come anew
    in each, which is filled with zeros first: up to a sixth of a step. Where the environment sets
    malloc's thresholds, they stay.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def stop_on_signals() -> None:
    """Make the signals that ask to stop raise StoppedError in the main thread, once."""

    def stop(number: int, _: FrameType | None) -> None:
        for later in SIGNALS:
            signal.signal(later, signal.SIG_IGN)
        raise StoppedError(
            f"stopped by {signal.Signals(number).name}; if a peer failed, its own line says why; "
            "the same command goes on from the newest checkpoint"
        )

    for number in SIGNALS:
        signal.signal(number, stop)


def terminate_launcher() -> None:
    """Ask a torchrun that would start the processes again to end: the run was asked to stop."""
    allowed, used = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("MAX_RESTARTS", "RESTART_COUNT")
    )
    if used < allowed:
        os.kill(os.getppid(), signal.SIGTERM)


def report_failure(
    message: str, *, exit_status: int = 1, traceback: str = "", **details: object
) -> None:
    """Write the launcher's error file, if it asked for one (``TORCHELASTIC_ERROR_FILE``).

    torchrun shows the message in its table of failures; `launch` raises it.

    Args:
        message: one line.
        exit_status: of this process.
        traceback: formatted.
        details: further entries of the file, which must be serializable as JSON.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return
    now = time.time()
    extra = {"timestamp": int(now), "py_callstack": traceback or message}
    shown = {"message": message, "extraInfo": extra, "errorCode": exit_status}
    partial = Path(f"{place}.partial")
    partial.write_text(
        json.dumps({"message": shown, "time": now, "traceback": traceback, **details})
    )
    partial.replace(place)


def leave(status: int) -> NoReturn:
    """End the process now, without tearing anything down.

    A process group whose peers are gone can hang, and a thread that still drops a tensor (of gloo,
    or the writer of checkpoint sets) aborts an interpreter that is finalizing.
    """
    flush_all()
    os._exit(status)
