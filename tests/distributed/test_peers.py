"""A missing peer is an error that names it, not a hang."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from architectures import build
from harness import RankContext, result_or_error, run

from dist_graft import Grafter, PeerError
from dist_graft.errors import StartError
from dist_graft.population.compat import set_timeout
from dist_graft.population.round.exchange import world
from dist_graft.population.runtime.devices import can_use_nccl
from dist_graft.population.runtime.peers import PeerRegistry


def graft_until_one_exits(context: RankContext, exiting: int, has_registry: bool):
    """Two rounds together; one network ends its process before the third."""
    peers = PeerRegistry(context.store, context.rank, context.networks) if has_registry else None
    if peers:
        peers.check_in(60)
    grafter = Grafter(build("plain", context.rank), peers=peers)
    grafter.graft()
    grafter.graft()
    if context.rank == exiting:
        os._exit(0)
    if has_registry:  # all others have reached the round before any of them fails
        peers.enter_round(grafter.round)
        if context.store.add("arrived", 1) == context.networks - 1:
            context.store.set("all arrived", "")
        context.store.wait(["all arrived"])
    return result_or_error(grafter.graft)


@pytest.mark.parametrize("exiting", [0, 1, 2])
def test_survivors_name_the_peer_that_exited_before_the_round(exiting):
    results = run(graft_until_one_exits, 3, exiting, True, ending={exiting})
    for rank, result in enumerate(results):
        if rank != exiting:
            kind, text = result
            assert kind == "PeerError"
            assert "round 2" in text
            assert f"network {exiting} (rank {exiting} on {socket.gethostname()})" in text
            assert not any(f"network {k} (" in text for k in {0, 1, 2} - {exiting})
            assert "\n" not in text


def check_when_one_exits(context: RankContext, exiting: int):
    """One network ends its process before the check at the start."""
    peers = PeerRegistry(context.store, context.rank, context.networks)
    peers.check_in(60)
    grafter = Grafter(build("plain", context.rank), peers=peers)
    if context.rank == exiting:
        os._exit(0)
    return result_or_error(grafter.check)


def test_survivors_of_a_check_do_not_name_themselves():
    results = run(check_when_one_exits, 3, 1, ending={1})
    for rank in (0, 2):
        kind, text = results[rank]
        assert kind == "PeerError"
        assert f"network {rank} (" not in text


def test_without_a_registry_the_error_names_nobody():
    results = run(graft_until_one_exits, 2, 1, False, ending={1})
    kind, text = results[0]
    assert kind == "PeerError"
    assert "round 2 failed, a peer died or did not respond" in text


def check_nccl(context: RankContext):
    peers = PeerRegistry(context.store, context.rank, context.networks)
    return can_use_nccl(torch.device("cpu"), peers, 60)


def test_nccl_needs_gpus():
    assert run(check_nccl, 2) == [False, False]


def graft_with_a_hanging_peer(context: RankContext):
    """Network 1 is alive but does not enter the round before the others give up."""
    peers = PeerRegistry(context.store, context.rank, context.networks)
    peers.check_in(60)
    grafter = Grafter(build("plain", context.rank), peers=peers)
    dist.barrier()  # with the long timeout
    set_timeout(timedelta(seconds=1), world())
    if context.rank == 1:
        context.store.wait(["gave up"])
        return None
    outcome = result_or_error(grafter.graft)
    context.store.set("gave up", "")
    return outcome


def test_a_hanging_peer_is_named_after_the_timeout():
    (kind, text), _ = run(graft_with_a_hanging_peer, 2)
    assert kind == "PeerError"
    assert "network 1 (rank 1 on " in text


def test_check_in_names_the_networks_that_did_not_start(store):
    store.set("host/0", "elsewhere")
    with pytest.raises(StartError, match=r"network 1, 3 did not start within 0\.2 s") as caught:
        PeerRegistry(store, 2, 4).check_in(0.2)
    assert "4 processes" in str(caught.value)


def check_in(context: RankContext):
    peers = PeerRegistry(context.store, context.rank, context.networks)
    peers.check_in(60)
    peers.enter_round(context.rank)
    peers.publish("score", str(10 * context.rank))
    scores = peers.collect("score", 60)
    return peers.missing_from_round(2), scores, [peers.describe(k) for k in range(context.networks)]


def test_all_networks_check_in_and_see_each_other():
    for missing, scores, names in run(check_in, 4):
        assert scores == ["0", "10", "20", "30"]
        assert [name.split(" on ")[0] for name in missing] == [
            "network 0 (rank 0",
            "network 1 (rank 1",
        ]
        assert missing == names[:2]


def test_collect_names_the_networks_that_published_nothing(store):
    for key in ("host/0", "host/1"):
        store.set(key, "elsewhere")
    local = PeerRegistry(store, 0, 2)
    local.publish("digest", "same")
    line = r"network 1 \(rank 1 on elsewhere\) did not respond within 0\.2 s \(digest\)"
    with pytest.raises(PeerError, match=line):
        local.collect("digest", 0.2)
    with pytest.raises(PeerError, match=line):
        local.read("digest", 1, 0.2)


def test_reading_from_a_dead_peer_fails_at_once(store):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.set("host/1", socket.gethostname())
    store.set("process/1", str(ended.pid))
    with pytest.raises(PeerError, match=r"network 1 \(rank 1 on .*\) died \(digest\)"):
        PeerRegistry(store, 0, 2).read("digest", 1, 100)


def test_a_lost_store_is_an_error_but_not_a_request_to_stop():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    peers = PeerRegistry(other, 1, 2)
    del server
    peers.request_stop("SIGTERM")  # reaches nobody
    assert peers.stop_reason() is None
    with pytest.raises(PeerError, match=r"key-value store is gone \(digest\)"):
        peers.read("digest", 0, 100)


def test_a_network_is_missing_until_it_reaches_the_round(store):
    local, other = PeerRegistry(store, 0, 2), PeerRegistry(store, 1, 2)
    for key in ("host/0", "host/1"):
        store.set(key, "here")
    local.enter_round(1)
    assert local.missing_from_round(1) == ["network 1 (rank 1 on here)"]
    other.enter_round(0)
    assert local.missing_from_round(1) == ["network 1 (rank 1 on here)"]
    other.enter_round(1)
    assert local.missing_from_round(1) == []


def test_a_network_whose_process_has_ended_is_dead(store):
    local = PeerRegistry(store, 0, 3)
    for network in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        store.set(f"process/{network}", str(process.pid))
    store.set("host/1", socket.gethostname())
    store.set("host/2", "elsewhere")  # processes there are not visible here
    local.check_in(20)
    assert local.dead_peers() == [local.describe(1)]
    store.set("process/1", str(os.getpid()))
    assert PeerRegistry(store, 0, 3).dead_peers() == []


class CountingStore:
    """Counts the requests to a store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.requests: list[str] = []

    def __getattr__(self, name: str):
        def request(*arguments):
            self.requests.append(name)
            return getattr(self._store, name)(*arguments)

        return request


def test_the_number_of_requests_does_not_grow_with_the_number_of_processes(store):
    """Also while waiting: 64 processes that ask for 64 keys each would keep the store busy."""
    others = range(1, 64)
    for rank in others:
        store.set(f"host/{rank}", "elsewhere")
        store.set(f"process/{rank}", "1")
        store.set(f"score/{rank}", str(rank))
    counting = CountingStore(store)
    peers = PeerRegistry(counting, 0, 64)
    peers.check_in(60)
    assert len(counting.requests) == 3
    counting.requests.clear()
    with pytest.raises(PeerError, match=r"network 0 .* did not respond"):
        peers.collect("score", 1.5)
    assert counting.requests.count("wait") == 2
    assert len(counting.requests) < 12 + 64  # the missing key is searched for once, at the end
    peers.publish("score", "0")
    counting.requests.clear()
    assert peers.collect("score", 60) == [str(rank) for rank in range(64)]
    assert counting.requests == ["check", "multi_get"]
