"""Assignment of processes to networks, and the numbers of processes that fit."""

from __future__ import annotations

import os
import threading

import pytest
import torch.distributed as dist

from dist_graft.errors import ConfigError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process_group import _refuse_differences
from dist_graft.population.runtime.process_info import ProcessInfo, array_index


def test_the_processes_of_a_network_have_consecutive_ranks() -> None:
    processes = [ProcessInfo(rank, 6, rank % 3, 3).with_replicas(3) for rank in range(6)]
    assert [process.network for process in processes] == [0, 0, 0, 1, 1, 1]
    assert [process.replica for process in processes] == [0, 1, 2, 0, 1, 2]
    assert [process.is_leader for process in processes] == [True, False, False] * 2
    assert [process.is_main for process in processes] == [True] + [False] * 5
    assert {process.networks for process in processes} == {2}
    assert str(processes[4]).startswith("network 1 (replica 1, rank 4 on ")
    assert str(ProcessInfo(1, 2, 1, 2)).startswith("network 1 (rank 1 on ")


def test_a_job_of_its_own_trains_one_network() -> None:
    processes = [ProcessInfo(rank, 2, rank, 2).with_replicas(2).as_job(5, 8) for rank in range(2)]
    assert [process.network for process in processes] == [5, 5]
    assert [process.networks for process in processes] == [8, 8]
    assert {process.connected_networks for process in processes} == {1}
    assert [process.is_main for process in processes] == [True, False]
    assert str(processes[1]).startswith("network 5 (replica 1, rank 1 on ")
    with pytest.raises(ConfigError, match=r"one network in each job, .* and 2 processes were"):
        ProcessInfo(0, 2, 0, 2).as_job(5, 8)


def test_the_index_of_a_task() -> None:
    assert array_index({}) is None
    assert array_index({"SLURM_ARRAY_TASK_ID": "3"}) == 3
    assert array_index({"JOB_COMPLETION_INDEX": "0"}) == 0
    assert array_index({"SLURM_ARRAY_TASK_ID": ""}) is None


@pytest.mark.parametrize(
    ("allocated", "here", "share"),
    [("", 1, 8), ("", 3, 2), ("4", 1, 4), ("4", 3, 1), ("64", 2, 4), ("1", 2, 1), ("x", 1, 8)],
)
def test_cores_are_shared_within_the_allocation_of_the_job(
    allocated: str, here: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", allocated)
    assert ProcessInfo(0, here, 0, here).cpu_share() == share


@pytest.mark.parametrize(
    ("bound", "here", "share"), [(16, 4, 4), (8, 4, 4), (4, 4, 4), (2, 4, 2), (16, 32, 1)]
)
def test_cores_of_a_process_that_torchrun_binds_to_some_of_them(
    bound: int, here: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = os.getppid()
    monkeypatch.setattr(
        "os.sched_getaffinity", lambda process: set(range(16 if process == launcher else bound))
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    process = ProcessInfo(0, here, 0, here, launched=True)
    assert (process.cores(), process.cpu_share()) == (16, share)


@pytest.mark.parametrize(
    ("processes", "here", "replicas"),
    [(1, 1, 1), (3, 2, 1), (3, 1, 1), (4, 4, 2), (8, 4, 2), (8, 4, 8), (8, 2, 4), (3, 3, 3)],
)
def test_numbers_of_processes_that_fit(processes: int, here: int, replicas: int) -> None:
    assert (
        ProcessInfo(0, processes, 0, here).with_replicas(replicas).networks == processes // replicas
    )


@pytest.mark.parametrize(
    ("processes", "here", "replicas", "text"),
    [
        (1, 1, 2, "1 process was started: start 2, 4, 6"),
        (5, 5, 2, "5 processes were started: start 2, 4, 6"),
        (6, 3, 2, "start equally many on each machine, 2, 4, 6 ..., or 1 where a network fills"),
        (12, 3, 4, "4, 8, 12 ..., or 1 or 2 where a network fills several machines"),
        (6, 4, 2, "4 of 6 processes on this machine"),
    ],
)
def test_numbers_of_processes_that_do_not_fit(
    processes: int, here: int, replicas: int, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ProcessInfo(0, processes, 0, here).with_replicas(replicas)
    assert text in str(caught.value)


def test_machines_of_different_sizes_are_an_error_on_all_ranks() -> None:
    """Machines of 2, 1 and 3 processes: the first one alone fits."""
    store = dist.HashStore()
    sizes = [2, 2, 1, 3, 3, 3]
    errors: dict[int, str] = {}

    def check_in(rank: int) -> None:
        process = ProcessInfo(rank, 6, 0, sizes[rank], replicas=2)
        peers = PeerRegistry(store, rank, 6, 2)
        peers.check_in(20)
        try:
            _refuse_differences(process, "{}", peers, 20)
        except ConfigError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=check_in, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == set(range(6))
    assert all("machines of 1 and 2 and 3 processes" in text for text in errors.values())
