from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from dist_graft.errors import PeerError, StoppedAtStartError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.failures import explain

HERE = ProcessInfo(world_size=2, local_world_size=2, launched=True)


@pytest.fixture
def peer() -> Iterator[subprocess.Popen[bytes]]:
    """The other process of a run."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def peers(peer: subprocess.Popen[bytes]) -> PeerRegistry:
    """Registry of this process, with rank 0, and its peer."""
    store = dist.HashStore()
    for rank, pid in enumerate((os.getpid(), peer.pid)):
        store.set(f"host/{rank}", socket.gethostname())
        store.set(f"process/{rank}", str(pid))
    return PeerRegistry(store, 0, 2)


def explained(number: signal.Signals, peers: PeerRegistry) -> BaseException:
    return explain(StoppedAtStartError.by(number), peers, HERE)


def test_a_stop_is_announced_to_the_peers(peers: PeerRegistry) -> None:
    error = StoppedAtStartError.by(signal.SIGINT)
    assert explain(error, peers, HERE) is error
    assert peers.stop_reason() == "SIGINT"


def test_a_signal_after_a_peer_has_failed_is_no_stop(
    peers: PeerRegistry, peer: subprocess.Popen[bytes]
) -> None:
    peer.kill()
    peer.wait()
    error = explained(signal.SIGTERM, peers)
    assert isinstance(error, PeerError)
    assert str(error).startswith("network 1 (rank 1 on ")
    assert peers.stop_reason() is None


@pytest.mark.parametrize("method", ["dead_peers", "stop_reason"])
def test_a_peer_that_stops_meanwhile_has_not_failed(
    method: str,
    peers: PeerRegistry,
    peer: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both receive SIGINT; the peer announces its stop and ends right after a look at it."""
    look: Callable[[], object] = getattr(peers, method)

    def look_before_it_ends() -> object:
        seen = look()
        peers.request_stop("SIGINT")
        peer.kill()
        peer.wait()
        return seen

    monkeypatch.setattr(peers, method, look_before_it_ends)
    assert isinstance(explained(signal.SIGINT, peers), StoppedAtStartError)
