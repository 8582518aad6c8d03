"""Rounds of jobs that share only a directory, without processes: one Grafter for each job."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyNetwork
from torch import Tensor, nn

from dist_graft import (
    Average,
    Diloco,
    Graft,
    Grafter,
    GraftRecord,
    NonFiniteError,
    Papa,
    Wash,
    graft_units,
)
from dist_graft.errors import RoundStoppedError
from dist_graft.grafting.mixing import mix
from dist_graft.grafting.rules.base import Rule
from dist_graft.population.round import files
from dist_graft.population.round.file_choice import Place
from dist_graft.population.round.files import JobState
from dist_graft.population.round.publications import publication_path, published_places

State = dict[str, Tensor]
UNITS = graft_units(TinyNetwork(10, 3))
RULES = [Graft(), Graft(criterion="shuffled"), Graft(topology="random"), Average(), Papa(beta=0.8)]


def make_model(network: int) -> nn.Module:
    torch.manual_seed(network)
    model = TinyNetwork(10, 3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


def state_of(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


class Job:
    """One network with its Grafter."""

    def __init__(self, folder: Path, network: int, networks: int = 3, **options: Any) -> None:
        self.model = make_model(network)
        self.grafter = Grafter(
            self.model,
            exchange="files",
            directory=folder,
            network=network,
            networks=networks,
            **options,
        )
        self.folder = folder / "exchange" / f"network{network:02d}"

    def graft(self, epoch: int, **options: Any) -> GraftRecord:
        record = self.grafter.graft(job=JobState(place=Place(epoch)), **options)
        self.grafter.flush()
        return record

    @property
    def state(self) -> State:
        return state_of(self.model)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="dist_graft"):
        yield caplog


def specified(rule: Rule, states: list[State], round_: int = 0) -> list[State]:
    """The states after a round of networks that run together."""
    information = torch.stack([rule.measure(UNITS, state) for state in states])
    return mix(states, UNITS, rule.decide(information, round_))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_rounds_in_step_equal_mix(tmp_path: Path, rule: Rule, networks: int) -> None:
    jobs = [
        Job(tmp_path, network, networks, rule=rule, max_lag=0, wait_seconds=math.inf)
        for network in range(networks)
    ]
    states = [job.state for job in jobs]
    for round_ in range(3):
        states = specified(rule, states, round_)
        with ThreadPoolExecutor(networks) as pool:
            records = list(pool.map(lambda job: job.graft(job.grafter.round), jobs))
        assert all(same(job.state, state) for job, state in zip(jobs, states, strict=True))
        assert all(set(record.lags.values()) == {0.0} for record in records)


def test_a_network_alone_trains_on_and_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path, 1)
    before = job.state
    record = job.graft(4)
    assert same(job.state, before)
    assert (record.donor, record.lags, record.donor_epoch, record.digest) == (-1, {}, None, None)
    assert set(record.coefficient.values()) == {1.0}
    assert published_places(job.folder, 1) == [Place(4)]


def test_a_late_network_takes_what_is_near(tmp_path: Path) -> None:
    ahead, behind, own = Job(tmp_path, 0), Job(tmp_path, 1), Job(tmp_path, 2)
    states = [ahead.state, behind.state, own.state]
    behind.graft(2)  # farther than 2 epochs from 5
    ahead.graft(6)
    record = own.graft(5)
    assert same(own.state, specified(Graft(), [states[0], states[2]])[1])
    assert (record.donor, record.lags, record.donor_epoch) == (0, {0: -1.0}, 6.0)
    assert record.digest is not None
    assert record.mixing.donors == ((), (), (0,))
    assert record.bytes_received == sum(
        t.numel() * t.element_size() for t in own.state.values() if t.is_floating_point()
    )


def test_networks_beyond_the_expected_size_are_found(tmp_path: Path) -> None:
    Job(tmp_path, 5, networks=6).graft(1)
    own = Job(tmp_path, 0, networks=2)
    record = own.graft(1)
    assert record.donor == 5
    assert record.mixing.networks == 6


def test_a_round_waits_for_its_donor_only(tmp_path: Path) -> None:
    donor, own = Job(tmp_path, 0), Job(tmp_path, 1, wait_seconds=60)
    waiting = threading.Thread(target=own.graft, args=(3,))
    waiting.start()
    donor.graft(2)  # network 2 never comes
    waiting.join(30)
    assert not waiting.is_alive()
    assert same(
        own.state, specified(Graft(), [make_model(0).state_dict(), make_model(1).state_dict()])[1]
    )


def test_a_finite_wait_ends(tmp_path: Path) -> None:
    record = Job(tmp_path, 1, max_lag=0, wait_seconds=0.05).graft(3)
    assert record.donor == -1


def test_a_request_to_stop_ends_an_unlimited_wait(tmp_path: Path) -> None:
    job = Job(tmp_path, 1, max_lag=0, wait_seconds=math.inf)
    before = job.state
    asked = iter([False, True])
    state = JobState(place=Place(3), should_stop=lambda: next(asked))
    with pytest.raises(RoundStoppedError, match="before round 0"):
        job.grafter.graft(job=state)
    with pytest.raises(RoundStoppedError, match="network 1 stops"):
        job.grafter.graft(stop=True)
    assert same(job.state, before)


def damage(path: Path, way: str) -> None:
    """Damage a publication in place, so that the header alone may look sound."""
    content = path.read_bytes()
    if way == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif way == "last byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("way", ["torn", "last byte", "empty", "folder"])
@pytest.mark.parametrize("rule", [Graft(), Average()], ids=str)
def test_a_damaged_publication_is_skipped(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, way: str, rule: Rule
) -> None:
    jobs = [Job(tmp_path, network, rule=rule) for network in range(3)]
    states = [job.state for job in jobs]
    for job in jobs[:2]:
        job.graft(3)
    states = [states[0], states[2]]
    path = publication_path(jobs[1].folder, Place(3))
    damage(path, way)
    record = jobs[2].graft(3)
    assert same(jobs[2].state, specified(rule, states)[1])
    assert record.donor == 0
    (warning,) = warnings.messages
    assert str(path) in warning
    assert "is skipped" in warning
    jobs[2].graft(3)
    assert warnings.messages == [warning]  # once for each file


def test_an_older_publication_replaces_a_damaged_one(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    donor, own = Job(tmp_path, 0, 2), Job(tmp_path, 1, 2)
    state = donor.state
    donor.graft(2)
    donor.graft(3)
    damage(publication_path(donor.folder, Place(3)), "torn")
    record = own.graft(3)
    assert record.lags == {0: 1.0}
    assert len(warnings.messages) == 1
    assert same(own.state, specified(Graft(), [state, make_model(1).state_dict()])[1])


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"rule": Graft(amplitude=0.9)}, "another model or rule"),
        ({"lead": "conv+linear"}, "another model or rule"),
    ],
)
def test_a_foreign_publication_is_skipped(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, other: dict[str, Any], reason: str
) -> None:
    Job(tmp_path, 0, **other).graft(3)
    own = Job(tmp_path, 1)
    assert own.graft(3).donor == -1
    assert reason in warnings.messages[0]


def test_a_publication_of_another_network_or_epoch_is_skipped(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    donor = Job(tmp_path, 0)
    donor.graft(3)
    publication_path(donor.folder, Place(3)).rename(publication_path(donor.folder, Place(4)))
    assert Job(tmp_path, 1).graft(4).donor == -1
    assert "it is of network 0 at epoch 3" in warnings.messages[0]


def test_weights_that_are_not_finite_are_never_blended(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, own = Job(tmp_path, 0, rule=Average()), Job(tmp_path, 1, rule=Average())
    before = own.state
    with torch.no_grad():
        donor.model[-1].bias[0] = math.nan  # type: ignore[index, union-attr]
    monkeypatch.setattr(
        "dist_graft.population.round.agreement.first_not_finite", lambda tensors: None
    )
    donor.graft(3)  # as a foreign program might
    assert own.graft(3).donor == -1
    assert same(own.state, before)
    assert "8.bias is not finite" in warnings.messages[0]


class TestDivergence:
    def diverged(self, tmp_path: Path, network: int, **options: Any) -> Job:
        job = Job(tmp_path, network, **options)
        with torch.no_grad():
            job.model[0].weight[0] = math.inf  # type: ignore[index, union-attr]
        return job

    def test_raise_ends_the_job(self, tmp_path: Path) -> None:
        job = self.diverged(tmp_path, 1)
        with pytest.raises(NonFiniteError, match=r"network 1 has .* not finite in 0\.weight"):
            job.graft(3)
        assert not job.folder.exists()

    def test_heal_copies_the_donor(self, tmp_path: Path) -> None:
        donor = Job(tmp_path, 0)
        state = {k: v for k, v in donor.state.items() if v.is_floating_point()}
        donor.graft(3)
        job = self.diverged(tmp_path, 1, on_divergence="heal")
        record = job.graft(3)
        assert record.healed == {1: 0}
        assert same(state, job.state)
        assert not job.folder.exists()

    def test_heal_without_a_donor_trains_on(self, tmp_path: Path) -> None:
        record = self.diverged(tmp_path, 1, on_divergence="heal").graft(3)
        assert record.healed == {}
        assert list(record.diverged) == [1]

    def test_exclude_is_not_published(self, tmp_path: Path) -> None:
        job = self.diverged(tmp_path, 0, on_divergence="exclude")
        job.graft(3)
        assert not job.folder.exists()
        assert Job(tmp_path, 1).graft(3).donor == -1

    @pytest.mark.parametrize("way", ["heal", "exclude"])
    def test_networks_in_step_know_of_a_diverged_one(self, tmp_path: Path, way: str) -> None:
        options: dict[str, Any] = {"max_lag": 0, "wait_seconds": math.inf, "on_divergence": way}
        jobs = [Job(tmp_path, 0, **options), self.diverged(tmp_path, 1, **options)]
        jobs.append(Job(tmp_path, 2, **options))
        states = [job.state for job in jobs]
        with ThreadPoolExecutor(3) as pool:
            records = list(pool.map(lambda job: job.graft(3), jobs))
        assert all(list(record.diverged) == [1] for record in records)
        assert same(jobs[2].state, states[2])  # its donor on the ring diverged
        healed = {k: v for k, v in states[0].items() if v.is_floating_point()}
        assert same(healed, jobs[1].state) == (way == "heal")


def test_a_job_joins_the_network_that_has_trained_farthest(tmp_path: Path) -> None:
    slow, fast, own = Job(tmp_path, 0), Job(tmp_path, 1), Job(tmp_path, 2)
    wanted = {k: v for k, v in fast.state.items() if v.is_floating_point()}
    place = JobState(place=Place(0))
    assert own.grafter.join(place) is None
    slow.graft(3)
    fast.graft(9)
    assert own.grafter.join(place) == (1, Place(9))
    assert same(wanted, own.state)


def test_the_search_looks_at_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(tmp_path, network, 8) for network in range(8)]
    for job in jobs:
        job.graft(3)
    opened: list[Path] = []
    real = files.Publication

    def count(path: Path) -> files.Publication:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(files, "Publication", count)
    jobs[0].graft(4)
    assert opened == [publication_path(jobs[7].folder, Place(3))]


class Counting(Average):
    """Rule that keeps a state from round to round."""

    def init_state(self, units: object, tensors: object) -> State:
        del units, tensors
        return {"rounds": torch.zeros(())}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "files"}, "needs directory, network and networks"),
        ({"exchange": "disk"}, "exchange must be one of all_gather, p2p, files"),
        ({"network": 3}, "network must be in 0 to 2, got 3"),
        ({"max_lag": -1}, "max_lag must be at least 0, got -1"),
        ({"wait_seconds": math.nan}, "wait_seconds must be at least 0, got nan"),
        ({"rule": Wash()}, "Wash needs all networks at the same step"),
        ({"rule": Diloco()}, "Diloco needs all networks at the same step"),
        ({"rule": Counting()}, "Counting needs all networks at the same step"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    complete = {"exchange": "files", "directory": tmp_path, "network": 0, "networks": 3}
    if "exchange" in options:
        complete = {}
    with pytest.raises(ValueError, match=message):
        Grafter(make_model(0), **complete | options)
