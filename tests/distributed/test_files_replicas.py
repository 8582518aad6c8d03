"""Replicas of a network that share only a directory with the other networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import RankContext, run
from tiny_network import TinyNetwork

from dist_graft import Grafter, graft_units
from dist_graft.errors import RoundStoppedError
from dist_graft.grafting.mixing import mix
from dist_graft.grafting.rules.graft import Graft
from dist_graft.population.round import files
from dist_graft.population.round.file_choice import Place
from dist_graft.population.round.files import JobState
from dist_graft.population.round.publications import PublicationError

PLACE = JobState(place=Place(3))


def make_model(network: int, replica: int = 0) -> TinyNetwork:
    torch.manual_seed(network)
    model = TinyNetwork(10, 3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0 + replica)  # differ, as after data-parallel training
    return model


def publish(folder: Path, network: int) -> None:
    grafter = Grafter(
        make_model(network), exchange="files", directory=folder, network=network, networks=3
    )
    grafter.graft(job=PLACE)
    grafter.flush()


def round_of_replicas(context: RankContext, folder: Path, fault: str) -> Any:
    """Run a round of network 2 in two replicas, in which replica 1 has a fault."""
    model = make_model(2, context.rank)
    world = dist.group.WORLD
    grafter = Grafter(
        model, exchange="files", directory=folder, network=2, networks=3, replica_group=world
    )
    job = PLACE
    if context.rank == 1 and fault == "read":
        real = files.Publication.read

        def read(publication: files.Publication, key: str) -> torch.Tensor:
            if publication.published.network == 1 and key == "3.weight":
                raise PublicationError("a cable was pulled")
            return real(publication, key)

        files.Publication.read = read  # type: ignore[method-assign]  # in a process of its own
    if context.rank == 1 and fault == "stop":
        job = JobState(place=Place(3), should_stop=lambda: True)
    try:
        record = grafter.graft(job=job)
    except RoundStoppedError:
        return "stopped"
    grafter.flush()
    return record.donor, {key: value.clone() for key, value in model.state_dict().items()}


def expected(donor: int) -> dict[str, torch.Tensor]:
    """State of network 2 after a round with one donor: its buffers are averaged first."""
    own = make_model(2)
    for buffer in own.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.5)
    states = [make_model(donor).state_dict(), own.state_dict()]
    units = graft_units(own)
    information = torch.stack([Graft().measure(units, state) for state in states])
    return mix(states, units, Graft().decide(information, 0))[1]


def check(tmp_path: Path, fault: str, donor: int) -> None:
    for network in (0, 1):
        publish(tmp_path, network)
    found = run(round_of_replicas, 2, tmp_path, fault)
    wanted = expected(donor)
    for found_donor, state in found:
        assert found_donor == donor
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_replicas_blend_the_same_publication(tmp_path: Path) -> None:
    check(tmp_path, "none", donor=1)
    published = sorted(path.name for path in (tmp_path / "exchange").glob("*/*"))
    assert published == ["epoch_0003.safetensors"] * 3


def test_a_file_that_fails_in_one_replica_is_used_by_none(tmp_path: Path) -> None:
    check(tmp_path, "read", donor=0)


def test_a_stop_of_one_replica_stops_both(tmp_path: Path) -> None:
    assert run(round_of_replicas, 2, tmp_path, "stop") == ["stopped", "stopped"]
