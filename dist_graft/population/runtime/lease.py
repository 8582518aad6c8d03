"""Lease files: one process at a time uses a folder, also across machines that share a disk."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_graft.errors import LeaseHeldError, RunDirectoryError
from dist_graft.population.runtime.process import has_ended, process_start
from dist_graft.run_directory import NO_HARD_LINKS

_DEFAULT_SECONDS = 60.0
_LARGEST_PID = 2**31
_POLL_SECONDS = 0.2
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # runs while a machine is suspended
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


@dataclass(frozen=True, kw_only=True)
class LeaseInfo:
    """Holder of a lease, as its file describes it."""

    host: str
    pid: int | None
    job: str | None
    """Job id of a batch system."""
    heartbeat_age: float
    """Seconds since the holder refreshed the lease."""
    expired: bool
    """Whether the holder has died on this machine, has not refreshed the lease in time, or was an
    earlier attempt of the job that this process belongs to."""
    token: str
    """Random; unique per acquisition."""

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Lease:
    """Exclusive use of a folder for one process (ADR 40).

    A thread refreshes the file's modification time, the heartbeat. The lease of a process that died
    on this machine, or of an earlier attempt of the same job, is taken over at once. That of
    another machine is taken over when its heartbeat is older than `expire_seconds` by the clock of
    the disk; the clocks of the machines are never compared.
    Both are atomic on local disks and NFS: a race has one winner.

    A process that was stopped for longer than `expire_seconds` must check `lost` before it writes.

    Args:
        path: lease file; its folder is created.
        holder: shown to others, in addition to `this_process`.
        expire_seconds: age of the heartbeat at which others may take over.
    """

    def __init__(
        self,
        path: Path,
        *,
        holder: Mapping[str, str | int] | None = None,
        expire_seconds: float = _DEFAULT_SECONDS,
    ) -> None:
        self._path = path
        self._token = secrets.token_hex(8)
        self._expire_seconds = expire_seconds
        self._content = json.dumps(
            {
                **this_process(),
                **(holder or {}),
                "pid": os.getpid(),
                "attempts": _attempts(),
                "machine": _machine(),
                "process_start": process_start(os.getpid()),
                "expire_seconds": expire_seconds,
                "token": self._token,
            }
        ).encode()
        self._refreshed = 0.0  # never
        self._made_folder = False
        self._lost = False
        self._lock = threading.Lock()
        self._released = threading.Event()

    def acquire(self) -> Lease:
        """Acquire the lease, and return it; call once.

        Raises: LeaseHeldError naming the holder; RunDirectoryError on a disk error.
        """
        try:
            began = _now()  # before the file's time, as this process may be stopped in between
            self._made_folder = not self._path.parent.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try_to_acquire():
                began = _now()
            self._remove_leftovers()
        except OSError as error:
            raise RunDirectoryError.not_written(self._path, error) from error
        self._refreshed = began
        threading.Thread(target=self._refresh_regularly, name="lease", daemon=True).start()
        return self

    @property
    def token(self) -> str:
        """Identifies this lease; see `is_taken_over`."""
        return self._token

    @property
    def lost(self) -> bool:
        """Whether another process took over; then this one must not write any more."""
        if self._is_held and not self._lost:
            self._lost = self._is_lost()
        return self._lost

    def release(self) -> None:
        """Give the lease up; without effect if it is lost or was never acquired."""
        with self._lock:
            # An expired lease may be taken over between check and removal: it is left alone.
            if self._is_held and not self.lost and not self._may_have_expired:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
            self._released.set()

    def undo(self) -> None:
        """Give the lease up, and remove the folder if the lease created it and it is empty."""
        self.release()
        if self._made_folder:
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    @property
    def _is_held(self) -> bool:
        return self._refreshed > 0 and not self._released.is_set()

    @property
    def _may_have_expired(self) -> bool:
        return _now() - self._refreshed > self._expire_seconds

    def _try_to_acquire(self) -> bool:
        """Return False if another process was faster, so that the state must be read again."""
        with self._new_file() as (new, now):
            chain = _read_chain(self._path, now)
            if not chain:
                return self._create(new, self._path)
            if not chain[-1].expired:
                raise LeaseHeldError(
                    f"{self._path.parent} is in use by {chain[-1]} (last heartbeat "
                    f"{chain[-1].heartbeat_age:.0f} s ago): wait until it ends, stop it, or choose "
                    f"another folder; if it has died, try again in {self._expire_seconds:.0f} s"
                )
            # Of all processes that see this expired lease, one can create its successor.
            successor = _successor(self._path, chain[-1].token)
            if not self._create(new, successor):
                return False
            # The lease may have been replaced or released before.
            chain = _read_chain(self._path, now)
            with contextlib.suppress(FileNotFoundError):
                if chain and chain[-1].token == self._token:
                    successor.replace(self._path)
                    return True
                if self._token not in {info.token for info in chain}:
                    successor.unlink()
            return False

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[tuple[Path, float]]:
        """A temporary file with this lease's content, and the time by the clock of the disk."""
        new = _successor(self._path, f"{self._token}.new")
        try:
            new.write_bytes(self._content)
            yield new, new.stat().st_mtime
        finally:
            new.unlink(missing_ok=True)

    def _create(self, new: Path, target: Path) -> bool:
        """Link a new file to its name; False if another process has created the target before."""
        try:
            os.link(new, target)
        except FileExistsError:
            # The target is ours if NFS repeated a request whose answer was lost.
            with contextlib.suppress(FileNotFoundError):
                return _read(target).get("token") == self._token
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            try:
                with target.open("xb") as file:
                    file.write(self._content)
            except FileExistsError:
                return False
        return True

    def _remove_leftovers(self) -> None:
        """Remove files of processes that died while they acquired the lease."""
        now = self._path.stat().st_mtime
        prefix = _successor(self._path, "").name
        for path in self._path.parent.iterdir():
            if path.name.startswith(prefix) and not path.name.startswith(prefix + self._token):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > self._expire_seconds:
                        path.unlink()

    def _is_lost(self) -> bool:
        try:
            if _successor(self._path, self._token).exists():
                return True
            return _read(self._path).get("token") != self._token
        except FileNotFoundError:
            # Released by another process that had taken over, or deleted with its folder.
            return self._may_have_expired
        except OSError:  # the disk does not answer: nothing can be written either
            return False

    def _refresh_regularly(self) -> None:
        while not self._released.wait(self._expire_seconds / 4) and not self.lost:
            with contextlib.suppress(OSError), self._lock:  # the next attempt may succeed
                if not self._released.is_set():
                    self._refresh()

    def _refresh(self) -> None:
        """Refresh the heartbeat; create the file again if it was deleted."""
        began = _now()
        try:
            os.utime(self._path)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._new_file() as (new, _):
                self._create(new, self._path)
        self._refreshed = began


def read_lease(path: Path) -> LeaseInfo | None:
    """Return the holder of a lease; None if nobody holds it. Nothing is written.

    The age of the heartbeat depends on this machine's clock; `Lease.acquire` uses the disk's.
    """
    try:
        chain = _read_chain(path, time.time())
    except OSError:  # not a file, or not readable
        return None
    return chain[-1] if chain else None


def is_taken_over(path: Path, token: str) -> bool:
    """Whether a lease is no longer that of this token, for processes that share the lease."""
    info = read_lease(path)
    return info is not None and info.token != token


def sees_lease(path: Path, token: str, seconds: float) -> bool:
    """Whether this process can read the lease with this token within so many seconds."""
    deadline = time.monotonic() + seconds
    while (info := read_lease(path)) is None or info.token != token:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def this_process() -> dict[str, str | int]:
    """Host, process id, and job id of a batch system, for the holder of a lease."""
    holder: dict[str, str | int] = {"host": socket.gethostname(), "pid": os.getpid()}
    environment = os.environ
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        holder["job"] = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '?')}"
    elif job := next(filter(None, map(environment.get, _JOB_VARIABLES)), None):
        holder["job"] = job
    return holder


def _read_chain(path: Path, now: float) -> list[LeaseInfo]:
    """The lease and its successors; the last one counts.

    More than one exist only while a lease is taken over, or if a process died then.
    """
    chain: list[LeaseInfo] = []
    file = path
    with contextlib.suppress(FileNotFoundError):
        while len({info.token for info in chain}) == len(chain):
            chain.append(_describe(file, now))
            file = _successor(path, chain[-1].token)
    return chain


def _describe(path: Path, now: float) -> LeaseInfo:
    content = _read(path)
    age = now - path.stat().st_mtime
    pid, start, limit = (content.get(key) for key in ("pid", "process_start", "expire_seconds"))
    pid = pid if isinstance(pid, int) and 0 < pid < _LARGEST_PID else None
    attempts, own_attempts = content.get("attempts"), _attempts()
    replaced = isinstance(attempts, dict) and any(
        isinstance(attempts.get(job), int) and attempts[job] < attempt
        for job, attempt in own_attempts.items()
    )
    died = content.get("machine") == _machine() and pid is not None and _has_died(pid, start)
    late = age > (limit if isinstance(limit, int | float) and limit >= 0 else _DEFAULT_SECONDS)
    job, token = content.get("job"), content.get("token")
    return LeaseInfo(
        host=str(content.get("host", "an unknown host")),
        pid=pid,
        job=None if job is None else str(job),
        heartbeat_age=max(0.0, age),
        expired=died or late or replaced,
        token=token if isinstance(token, str) and token.isalnum() else "",
    )


def _read(path: Path) -> dict[str, Any]:
    """Content of a lease; empty if it is damaged, so that only its age counts."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _successor(path: Path, token: str) -> Path:
    """File of the lease that replaces the one with this token."""
    return path.with_name(f".{path.name}.{token}")


def _attempts() -> dict[str, int]:
    """Attempts of the jobs that this process belongs to, by job. A new one replaces the others."""
    jobs = {
        "slurm": ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        "torchrun": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    }
    attempts = {}
    for launcher, (name, count) in jobs.items():
        job, attempt = os.environ.get(name, "none"), os.environ.get(count, "0")
        if job != "none" and attempt.isdecimal():  # torchrun's default names no job
            attempts[f"{launcher} {job}"] = int(attempt)
    return attempts


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _machine() -> str:
    """Identifies the processes that are visible here: boot id and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no /proc
        return socket.gethostname()


def _has_died(pid: int, start: object) -> bool:
    """Whether a process of this machine has ended; its id may have been reused since."""
    if start is None:  # no /proc
        return has_ended(pid)
    return process_start(pid) != start
