"""Errors reported by a process whose run fails."""

from __future__ import annotations

import signal
from contextlib import suppress

import torch

from dist_graft.errors import (
    SEE_PEER,
    ConfigError,
    DataError,
    DistGraftError,
    PeerError,
    StartError,
    StoppedAtStartError,
)
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import leave
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import print_line


def explain(
    error: BaseException, peers: PeerRegistry | None, process: ProcessInfo
) -> BaseException:
    """Return the error to report: the peer that exited, or what the user can do."""
    if isinstance(error, StoppedAtStartError) and peers:
        return _stop_or_peer(error, peers, process)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        return ConfigError(
            f"out of memory ({text or type(error).__name__}): reduce data.batch_size, or the "
            "number of networks on this machine"
        )
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return DataError(
            f"a loader worker has died ({text}): often memory or /dev/shm is full; reduce "
            "data.workers or data.batch_size"
        )
    if isinstance(error, RuntimeError) and text.startswith("can't start new thread"):
        return StartError(
            "can't start new thread: the limit of processes is reached (ulimit -u, or the "
            "container's); raise it, or reduce data.workers or the networks on this machine"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError(
            f"out of GPU memory ({str(error).splitlines()[0]}): reduce data.batch_size, or "
            "split batches with optim.accumulation"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cause = " ".join(str(error).splitlines()[:2])[:200]  # pages of compiler output follow
        return ConfigError(
            f"torch.compile failed ({cause}): check the C++ compiler (on a "
            "GPU also Triton), or use runtime.compile false, which shows errors of the model"
        )
    return error


def _stop_or_peer(
    error: StoppedAtStartError, peers: PeerRegistry, process: ProcessInfo
) -> DistGraftError:
    """The stop, unless the launcher sent the signal because a peer has failed.

    A peer that ends because of the same stop announces it first, so the announcement is read after
    the list of peers that have ended.
    """
    resume = "rerun the command to resume from the latest checkpoint"
    with suppress(PeerError):
        exited = peers.dead_peers()
        if not peers.stop_reason():
            if exited:
                return PeerError(f"{'; '.join(exited)} ended: {SEE_PEER}; {resume}")
            number = signal.Signals(error.exit_status - 128)
            if number == signal.SIGTERM and process.local_world_size < process.world_size:
                return PeerError(f"stopped by SIGTERM; if a peer failed, {SEE_PEER}; {resume}")
            peers.request_stop(number.name)
    return error


def leave_without_peers(process: ProcessInfo, seconds: float) -> None:
    """Exit after the grace period of a requested stop: the peers did not respond in time."""
    print_line(
        f"dist-graft: error: {process}: could not stop gracefully within {seconds:g} s "
        "(--checkpoint.grace_seconds); rerun the command to resume from the latest checkpoint"
    )
    leave(1)
