"""A peer that comes later than the group's time-out, and earlier than timeouts ends."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import Place, attempt, run

from dist_graft.population.runtime.process_group import Runtime, _mesh
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts

AT_FIRST = 1.5
LATE = 3.0


def meet_late(here: Place, learn: str) -> list[object]:
    """The second process comes late to each meeting; what each of them hears."""
    dist.barrier()  # only then is a time-out short
    dist.set_timeout(timedelta(seconds=AT_FIRST))
    place = ProcessInfo(here.rank, here.networks, here.rank, here.networks)
    runtime = Runtime(place, torch.device("cpu"), "gloo", Timeouts(AT_FIRST, epochs=30), None)
    if learn == "an epoch":
        runtime.observe_epoch(1.0)
    if learn == "its own":
        runtime.observe_local_epoch(1.0)
    heard = []
    for meeting in (
        lambda: runtime.gather([float(here.rank)], "the report"),
        lambda: runtime.sum_over_networks(torch.tensor([1.0 + here.rank]), "the ensemble").tolist(),
    ):
        if here.rank == 1:
            time.sleep(LATE)
        heard.append(attempt(meeting))
    return heard


@pytest.mark.parametrize("learn", ["an epoch", "its own"])
def test_a_slow_network_is_waited_for_as_long_as_epochs_allow(learn: str) -> None:
    for heard in run(meet_late, 2, learn):
        assert heard == [[[0.0], [1.0]], [3.0]]


def test_before_an_epoch_is_over_the_first_time_out_holds() -> None:
    for kind, text in (heard[0] for heard in run(meet_late, 2, "nothing")):
        assert kind == "PeerError"
        assert "during the report" in text


def sum_late(here: Place) -> object:
    """Two networks of two processes each: the second one comes late to a sum over the networks."""
    place = ProcessInfo(here.rank, here.networks, here.rank, here.networks, replicas=2)
    mesh = _mesh(place, "cpu", timedelta(seconds=60))
    dist.barrier()
    for group in mesh.get_all_groups():
        dist.set_timeout(timedelta(seconds=AT_FIRST), group)
    timeouts = Timeouts(AT_FIRST, epochs=30)
    runtime = Runtime(place, torch.device("cpu"), "gloo", timeouts, None, mesh)
    runtime.observe_epoch(1.0)
    if place.network == 1:
        time.sleep(LATE)
    return attempt(
        lambda: runtime.sum_over_networks(torch.tensor([1.0 + here.rank]), "the ensemble").tolist()
    )


def test_so_it_is_where_several_processes_train_each_network() -> None:
    assert run(sum_late, 4) == [[4.0], [6.0], [4.0], [6.0]]


@pytest.mark.parametrize(("epoch_seconds", "longest"), [(0.0, 20.0), (0.1, 20.0), (9.0, 45.0)])
def test_the_longest_wait_is_never_less_than_at_first(epoch_seconds: float, longest: float) -> None:
    timeouts = Timeouts(20.0, epochs=5)
    timeouts.observe_epoch(epoch_seconds)
    assert timeouts.longest_wait == longest
