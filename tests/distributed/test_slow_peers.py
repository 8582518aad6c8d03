"""A peer that arrives after the group's own timeout and before the timeout of the run."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import RankContext, result_or_error, run

from dist_graft.population.compat import set_timeout
from dist_graft.population.round.exchange import world
from dist_graft.population.runtime.process_group import Runtime, _mesh
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts

INITIAL = 1.5
LATE = 3.0


def gather_late(here: RankContext, observed: str) -> list[object]:
    """Results of two collectives that the second process enters late."""
    dist.barrier()  # with the long timeout
    set_timeout(timedelta(seconds=INITIAL), world())
    process = ProcessInfo(here.rank, here.networks, here.rank, here.networks)
    runtime = Runtime(process, torch.device("cpu"), "gloo", Timeouts(INITIAL, epochs=30), None)
    if observed == "an epoch":
        runtime.observe_epoch(1.0)
    if observed == "a local epoch":
        runtime.observe_local_epoch(1.0)
    results = []
    for collective in (
        lambda: runtime.gather([float(here.rank)], "the report"),
        lambda: runtime.sum_over_networks(torch.tensor([1.0 + here.rank]), "the ensemble").tolist(),
    ):
        if here.rank == 1:
            time.sleep(LATE)
        results.append(result_or_error(collective))
    return results


@pytest.mark.parametrize("observed", ["an epoch", "a local epoch"])
def test_the_timeout_for_a_slow_network_follows_its_epochs(observed: str) -> None:
    for results in run(gather_late, 2, observed):
        assert results == [[[0.0], [1.0]], [3.0]]


def test_the_initial_timeout_applies_to_the_first_epoch() -> None:
    for kind, text in (results[0] for results in run(gather_late, 2, "nothing")):
        assert kind == "PeerError"
        assert "during the report" in text


def sum_late(here: RankContext) -> object:
    """Two networks of two processes each; the second enters a sum over the networks late."""
    process = ProcessInfo(here.rank, here.networks, here.rank, here.networks, replicas=2)
    mesh = _mesh(process, "cpu", timedelta(seconds=60))
    dist.barrier()
    for group in mesh.get_all_groups():
        set_timeout(timedelta(seconds=INITIAL), group)
    timeouts = Timeouts(INITIAL, epochs=30)
    runtime = Runtime(process, torch.device("cpu"), "gloo", timeouts, None, mesh)
    runtime.observe_epoch(1.0)
    if process.network == 1:
        time.sleep(LATE)
    return result_or_error(
        lambda: runtime.sum_over_networks(torch.tensor([1.0 + here.rank]), "the ensemble").tolist()
    )


def test_the_timeout_follows_epochs_with_replicas() -> None:
    assert run(sum_late, 4) == [[4.0], [6.0], [4.0], [6.0]]


@pytest.mark.parametrize(("epoch_seconds", "longest"), [(0.0, 20.0), (0.1, 20.0), (9.0, 45.0)])
def test_the_longest_wait_is_at_least_the_initial_timeout(
    epoch_seconds: float, longest: float
) -> None:
    timeouts = Timeouts(20.0, epochs=5)
    timeouts.observe_epoch(epoch_seconds)
    assert timeouts.longest_wait == longest
