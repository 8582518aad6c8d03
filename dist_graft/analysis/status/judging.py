"""Whether a run goes on, has ended well, was stopped, failed or died, in words."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from dist_graft.analysis.status.reading import NetworkFiles, RunFiles
from dist_graft.monitoring.console import duration
from dist_graft.monitoring.status_file import BEAT_SECONDS, ENDED

State = Literal["starting", "running", "finished", "stopped", "failed", "died"]
UNDER_WAY: tuple[State, ...] = ("starting", "running")

_SILENT_SECONDS = 90.0  # a shared filesystem may show a file's last version for a minute
_UNCERTAIN_SECONDS = 2 * BEAT_SECONDS + 1
_FOLLOWED = "stopped by "  # how those end whose launcher reacts to another's failure


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What can be said of a run as a whole."""

    state: State
    words: str
    alive: frozenset[int]
    """Networks whose processes give signs of life."""


def judge(run: RunFiles, now: float) -> Verdict:
    """What has become of a run, at a time in seconds since 1970."""
    alive = frozenset(files.network for files in run.networks if _is_alive(files, now))
    state, words = _state(run, alive, now)
    return Verdict(state=state, words=words, alive=alive)


def silent_seconds(files: NetworkFiles, now: float) -> float | None:
    """Since the network's process gave its last sign of life; None when it never did."""
    written = (files.standing or {}).get("time")
    return max(0.0, now - written) if isinstance(written, (int, float)) else None


def phase_of(files: NetworkFiles) -> str | None:
    """What the network's process did when it last wrote."""
    phase = (files.standing or {}).get("phase")
    return phase if isinstance(phase, str) else None


def _is_alive(files: NetworkFiles, now: float) -> bool:
    silent = silent_seconds(files, now)
    if silent is None or phase_of(files) in ENDED:
        return False
    return silent < _UNCERTAIN_SECONDS or (silent < _SILENT_SECONDS and not _is_gone(files))


def _is_gone(files: NetworkFiles) -> bool:
    """Whether the process ran on this host and is there no more."""
    standing: dict[str, Any] = files.standing or {}
    if standing.get("host") != socket.gethostname() or not isinstance(standing.get("pid"), int):
        return False
    try:
        os.kill(standing["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _state(run: RunFiles, alive: Collection[int], now: float) -> tuple[State, str]:
    goes_on = _goes_on(run)
    dead = [files for files in run.networks if _died(files, alive)]
    errors = {files.network: error for files in run.networks if (error := _error(files))}
    if alive:
        lost = [*(f.network for f in dead), *(k for k in errors if k not in alive)]
        without = f", but without {_names(lost)}" if lost else ""
        phases = {phase_of(files) for files in run.networks if files.network in alive}
        if phases == {"starting"}:
            return "starting", f"starting: loading data and meeting the other networks{without}"
        return "running", f"running{without}"
    if _is_finished(run):
        return "finished", "finished: all epochs are done, and the results are in summary.json"
    if run.stopped is not None and not dead:
        return "stopped", " ".join(run.stopped.split()) or f"stopped early; {goes_on}"
    causes = [f"network {k}: {error}" for k, error in errors.items() if _FOLLOWED not in error]
    if causes:
        return "failed", f"failed: {causes[0]}; {goes_on}"
    if dead:
        last = [seconds for f in dead if (seconds := silent_seconds(f, now)) is not None]
        return "died", (
            f"died: {_names([f.network for f in dead])} gave the last sign of life "
            f"{duration(min(last, default=0))} ago and no reason (killed, out of memory, or the "
            f"machine is gone); {goes_on}"
        )
    if errors:
        network, error = next(iter(errors.items()))
        return "failed", f"failed: network {network}: {error}"
    return "died", f"not running, and nothing says why it is not finished; {goes_on}"


def _died(files: NetworkFiles, alive: Collection[int]) -> bool:
    phase = phase_of(files)
    return phase is not None and phase not in ENDED and files.network not in alive


def _error(files: NetworkFiles) -> str | None:
    """Why a network's process failed, by its log or else by its last word."""
    if phase_of(files) == "finished":  # the log tells of a later start that was refused
        return None
    if files.error or phase_of(files) != "failed":
        return files.error
    reason = (files.standing or {}).get("reason")
    return str(reason) if reason else "no reason given"


def _is_finished(run: RunFiles) -> bool:
    epochs = [files.last["epoch"] + 1 for files in run.networks if files.last]
    reached = max([*epochs, run.epochs_saved], default=0)
    return run.summary is not None and reached >= max(1, run.epochs)


def _goes_on(run: RunFiles) -> str:
    if run.newest_set is None:
        return "there is no checkpoint set to go on from"
    return f"the same command goes on from {run.newest_set}"


def _names(networks: Collection[int]) -> str:
    plural = "s" if len(networks) > 1 else ""
    return f"network{plural} {', '.join(map(str, sorted(networks)))}"
