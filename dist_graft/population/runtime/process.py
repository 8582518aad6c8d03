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

from dist_graft.errors import StoppedError
from dist_graft.printing import flush_all

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks a run to stop."""
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
_NEVER = 2**31 - 1
_LARGEST = 32 << 20  # that malloc takes


def die_with_launcher() -> None:
    """Have the kernel kill this process when the launcher dies (Linux), so that none is orphaned.

    A run that is started again after its launcher was killed thus never meets the old processes.
    """
    launcher = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)


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


def report_failure(line: str) -> None:
    """Tell torchrun why this process ends, so that its table of failures shows the line."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        message = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        Path(place).write_text(json.dumps({"message": message}))


def leave(status: int) -> None:
    """End the process now, without tearing anything down.

    A process group whose peers are gone can hang, and a thread that still drops a tensor (of gloo,
    or the writer of checkpoint sets) aborts an interpreter that is finalizing.
    """
    flush_all()
    os._exit(status)
