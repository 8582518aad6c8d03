"""A peer that is not there is an error that names it, instead of a wait for ever."""

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
from harness import Place, attempt, run

from dist_graft import Grafter, PeerError
from dist_graft.errors import StartError
from dist_graft.population.runtime.devices import can_use_nccl
from dist_graft.population.runtime.peers import PeerRegistry


def graft_until_one_is_gone(place: Place, gone: int, called: bool):
    """Two rounds together; the network `gone` ends its process before the third."""
    peers = PeerRegistry(place.store, place.rank, place.networks) if called else None
    if peers:
        peers.check_in(60)
    grafter = Grafter(build("plain", place.rank), peers=peers)
    grafter.graft()
    grafter.graft()
    if place.rank == gone:
        os._exit(0)
    if called:  # so that only `gone` has not reached the round when the others fail
        peers.enter_round(grafter.round)
        if place.store.add("arrived", 1) == place.networks - 1:
            place.store.set("all arrived", "")
        place.store.wait(["all arrived"])
    return attempt(grafter.graft)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_survivors_name_the_peer_that_ended_before_the_round(gone):
    results = run(graft_until_one_is_gone, 3, gone, True, ending={gone})
    for rank, result in enumerate(results):
        if rank != gone:
            kind, text = result
            assert kind == "PeerError"
            assert "round 2" in text
            assert f"network {gone} (rank {gone} on {socket.gethostname()})" in text
            assert not any(f"network {k} (" in text for k in {0, 1, 2} - {gone})
            assert "\n" not in text


def check_when_one_is_gone(place: Place, gone: int):
    """The network `gone` ends its process before the comparison at the start."""
    peers = PeerRegistry(place.store, place.rank, place.networks)
    peers.check_in(60)
    grafter = Grafter(build("plain", place.rank), peers=peers)
    if place.rank == gone:
        os._exit(0)
    return attempt(grafter.check)


def test_survivors_of_a_check_do_not_name_themselves():
    results = run(check_when_one_is_gone, 3, 1, ending={1})
    for rank in (0, 2):
        kind, text = results[rank]
        assert kind == "PeerError"
        assert f"network {rank} (" not in text


def test_without_a_roll_call_the_error_says_that_a_peer_is_gone():
    results = run(graft_until_one_is_gone, 2, 1, False, ending={1})
    kind, text = results[0]
    assert kind == "PeerError"
    assert "round 2 failed, a peer died or did not answer" in text


def ask_for_nccl(place: Place):
    peers = PeerRegistry(place.store, place.rank, place.networks)
    return can_use_nccl(torch.device("cpu"), peers, 60)


def test_processes_without_gpus_are_not_served_by_nccl():
    assert run(ask_for_nccl, 2) == [False, False]


def graft_with_a_silent_peer(place: Place):
    """Network 1 lives but comes to the round only after the others gave up."""
    peers = PeerRegistry(place.store, place.rank, place.networks)
    peers.check_in(60)
    grafter = Grafter(build("plain", place.rank), peers=peers)
    if place.rank == 1:
        place.store.wait(["gave up"])
        return None
    outcome = attempt(grafter.graft)
    place.store.set("gave up", "")
    return outcome


def test_a_peer_that_does_not_come_is_named_after_the_time_out():
    (kind, text), _ = run(graft_with_a_silent_peer, 2, group_timeout=1)
    assert kind == "PeerError"
    assert "network 1 (rank 1 on " in text


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


def test_check_in_names_the_networks_that_did_not_start(store):
    store.set("host/0", "elsewhere")
    with pytest.raises(StartError, match=r"network 1, 3 did not start within 0\.2 s") as caught:
        PeerRegistry(store, 2, 4).check_in(0.2)
    assert "4 processes" in str(caught.value)


def check_in(place: Place):
    peers = PeerRegistry(place.store, place.rank, place.networks)
    peers.check_in(60)
    peers.enter_round(place.rank)
    peers.publish("score", str(10 * place.rank))
    scores = peers.collect("score", 60)
    return peers.missing_from_round(2), scores, [peers.describe(k) for k in range(place.networks)]


def test_all_networks_check_in_and_see_each_other():
    for absent, scores, names in run(check_in, 4):
        assert scores == ["0", "10", "20", "30"]
        assert [name.split(" on ")[0] for name in absent] == [
            "network 0 (rank 0",
            "network 1 (rank 1",
        ]
        assert absent == names[:2]


def test_collect_names_the_networks_that_did_not_answer(store):
    store.set("host/1", "elsewhere")
    mine = PeerRegistry(store, 0, 2)
    mine.publish("digest", "same")
    line = r"network 1 \(rank 1 on elsewhere\) did not answer within 0\.2 s \(digest\)"
    with pytest.raises(PeerError, match=line):
        mine.collect("digest", 0.2)
    with pytest.raises(PeerError, match=line):
        mine.read("digest", 1, 0.2)


def test_who_died_is_not_waited_for(store):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.set("host/1", socket.gethostname())
    store.set("process/1", str(ended.pid))
    with pytest.raises(PeerError, match=r"network 1 \(rank 1 on .*\) died \(digest\)"):
        PeerRegistry(store, 0, 2).read("digest", 1, 100)


def test_a_store_that_is_gone_is_an_error_and_asks_nobody_to_stop():
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", kept.port, is_master=False)
    peers = PeerRegistry(other, 1, 2)
    del kept
    peers.request_stop("SIGTERM")  # which nobody can hear
    assert peers.stop_reason() is None
    with pytest.raises(PeerError, match=r"key-value store is gone \(digest\)"):
        peers.read("digest", 0, 100)


def test_a_network_is_absent_until_it_has_reached_the_round(store):
    mine, other = PeerRegistry(store, 0, 2), PeerRegistry(store, 1, 2)
    for key in ("host/0", "host/1"):
        store.set(key, "here")
    mine.enter_round(1)
    assert mine.missing_from_round(1) == ["network 1 (rank 1 on here)"]
    other.enter_round(0)
    assert mine.missing_from_round(1) == ["network 1 (rank 1 on here)"]
    other.enter_round(1)
    assert mine.missing_from_round(1) == []


def test_a_network_whose_process_has_ended_is_gone(store):
    mine = PeerRegistry(store, 0, 3)
    for network in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        store.set(f"process/{network}", str(process.pid))
    store.set("host/1", socket.gethostname())
    store.set("host/2", "elsewhere")  # whose processes cannot be seen from here
    mine.check_in(20)
    assert mine.dead_peers() == [mine.describe(1)]
    store.set("process/1", str(os.getpid()))
    assert mine.dead_peers() == []
