"""Which process trains which network, and which numbers of processes fit."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from dist_graft.errors import ConfigError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process_group import _refuse_uneven_machines
from dist_graft.population.runtime.process_info import ProcessInfo


def test_the_processes_of_a_network_are_neighbours() -> None:
    places = [ProcessInfo(rank, 6, rank % 3, 3).with_replicas(3) for rank in range(6)]
    assert [place.network for place in places] == [0, 0, 0, 1, 1, 1]
    assert [place.replica for place in places] == [0, 1, 2, 0, 1, 2]
    assert [place.is_leader for place in places] == [True, False, False] * 2
    assert {place.networks for place in places} == {2}
    assert str(places[4]).startswith("network 1 (replica 1, rank 4 on ")
    assert str(ProcessInfo(1, 2, 1, 2)).startswith("network 1 (rank 1 on ")


@pytest.mark.parametrize(
    ("allotted", "here", "share"),
    [("", 1, 8), ("", 3, 2), ("4", 1, 4), ("4", 3, 1), ("64", 2, 4), ("1", 2, 1), ("x", 1, 8)],
)
def test_cores_are_those_of_the_job(
    allotted: str, here: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", allotted)
    assert ProcessInfo(0, here, 0, here).cpu_share() == share


@pytest.mark.parametrize(
    ("processes", "here", "replicas"),
    [(1, 1, 1), (3, 2, 1), (3, 1, 1), (4, 4, 2), (8, 4, 2), (8, 4, 8), (8, 2, 4), (3, 3, 3)],
)
def test_numbers_that_fit(processes: int, here: int, replicas: int) -> None:
    assert (
        ProcessInfo(0, processes, 0, here).with_replicas(replicas).networks == processes // replicas
    )


@pytest.mark.parametrize(
    ("processes", "here", "replicas", "said"),
    [
        (1, 1, 2, "1 process was started: start 2, 4, 6"),
        (5, 5, 2, "5 processes were started: start 2, 4, 6"),
        (6, 3, 2, "start equally many on each machine, 2, 4, 6 ..., or 1 where a network fills"),
        (12, 3, 4, "4, 8, 12 ..., or 1 or 2 where a network fills several machines"),
        (6, 4, 2, "4 of 6 processes on this machine"),
    ],
)
def test_numbers_that_do_not(processes: int, here: int, replicas: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProcessInfo(0, processes, 0, here).with_replicas(replicas)
    assert said in str(caught.value)


def test_machines_of_different_sizes_are_refused_by_all() -> None:
    """Of 2, 1 and 3 processes: the first could not know it alone."""
    store = dist.HashStore()
    sizes = [2, 2, 1, 3, 3, 3]
    said: dict[int, str] = {}

    def meet(rank: int) -> None:
        place = ProcessInfo(rank, 6, 0, sizes[rank], replicas=2)
        peers = PeerRegistry(store, rank, 6, 2)
        peers.check_in(20)
        try:
            _refuse_uneven_machines(place, peers, 20)
        except ConfigError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) == set(range(6))
    assert all("machines of 1 and 2 and 3 processes" in text for text in said.values())
