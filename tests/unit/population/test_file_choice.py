"""Which publications a network uses, and the shares that it decides on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft import Average, Graft, NonFiniteError, Papa, Wash
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.rules.base import Rule
from dist_graft.population.round.file_choice import (
    Place,
    Published,
    decide_among,
    needed_from,
    upstream,
    usable,
)

UNITS = 3
RULES = [
    *(Graft(), Graft(criterion="shuffled", seed=3), Graft(topology="random", seed=2)),
    *(Average(), Papa(beta=0.7), Papa(variant="pairs")),
]


def published(network: int, *, diverged: str = "", epoch: int = 4) -> Published:
    generator = torch.Generator().manual_seed(network)
    information = torch.rand(UNITS, generator=generator, dtype=torch.float64)
    return Published(
        network=network,
        place=Place(epoch),
        round=epoch,
        schema="",
        information=() if diverged else tuple(information.tolist()),
        diverged=diverged,
        units=UNITS,
    )


def test_places_are_ordered_by_epoch_and_step() -> None:
    assert sorted([Place(2, 1, 4), Place(1, 3, 4), Place(2, 0, 4)]) == [
        *(Place(1, 3, 4), Place(2, 0, 4), Place(2, 1, 4))
    ]
    assert Place(2, 1, 4).lag_of(Place(1, 3, 4)) == 0.5
    assert Place(2).lag_of(Place(5)) == -3


def test_usable_places_are_near_and_the_newest_first() -> None:
    places = [Place(epoch) for epoch in (1, 3, 5, 7, 8)]
    assert usable(Place(5), places, 2) == [Place(7), Place(5), Place(3)]
    assert usable(Place(5), places, 0) == [Place(5)]
    assert usable(Place(5), places, 1) == [Place(5)]
    assert usable(Place(20), places, 2) == []


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(0, 40))
def test_upstream_begins_with_the_donor_on_the_ring(networks: set[int], network: int) -> None:
    found = upstream(network, sorted(networks | {network}))
    assert set(found) == networks - {network}
    assert found == [
        *sorted((n for n in found if n < network), reverse=True),
        *sorted((n for n in found if n > network), reverse=True),
    ]


def test_what_the_slowest_network_needs() -> None:
    assert needed_from({0: Place(5), 1: Place(3, 2), 2: Place(4)}, range(3)) == Place(3, 2)
    assert needed_from({0: Place(5), 1: None, 2: Place(4)}, range(3)) == Place(0)
    assert needed_from({0: Place(5)}, range(2)) == Place(0)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 5])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_all_networks_together_decide_as_the_rule(rule: Rule, networks: int, rate: float) -> None:
    all_jobs = [published(network) for network in range(networks)]
    matrix = torch.tensor([each.information for each in all_jobs], dtype=torch.float64)
    whole = rule.decide(matrix, 4)
    if rate != 1.0:
        whole = whole.scaled(rate)
    for network, own in enumerate(all_jobs):
        others = [each for each in all_jobs if each is not own]
        decided = decide_among(rule, own, others, rate=rate, heal=False)
        mixing = decided.for_population(networks)
        assert decided.diverged == {}
        assert mixing.donors[network] == whole.donors[network]
        assert torch.equal(mixing.shares[:, network], whole.shares[:, network])
        for other in set(range(networks)) - {network}:
            assert mixing.donors[other] == ()
            assert mixing.own_share(other) == [1.0] * UNITS


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.needs_only_donor], ids=str)
def test_on_the_ring_the_donor_alone_decides(rule: Rule) -> None:
    all_jobs = [published(network) for network in range(4)]
    own, donor = all_jobs[2], all_jobs[1]
    of_all = decide_among(rule, own, [*all_jobs[:2], all_jobs[3]], rate=1.0, heal=True)
    of_two = decide_among(rule, own, [donor], rate=1.0, heal=True)
    assert torch.equal(of_all.for_population(4).shares, of_two.for_population(4).shares)


def test_the_ring_closes_over_the_networks_that_are_present() -> None:
    decided = decide_among(Graft(), published(5), [published(1), published(3)], rate=1.0, heal=True)
    assert decided.present == [1, 3, 5]
    mixing = decided.for_population(4)
    assert mixing.networks == 6
    assert mixing.donors == ((), (), (), (), (), (3,))
    first = decide_among(Graft(), published(1), [published(5), published(3)], rate=1.0, heal=True)
    assert first.for_population(4).donors[1] == (5,)


def test_a_network_alone_keeps_its_weights() -> None:
    for own in (published(2), published(2, diverged="a loss")):
        mixing = decide_among(Graft(), own, [], rate=1.0, heal=True).for_population(3)
        assert mixing.donors == ((), (), ())
        assert torch.equal(mixing.shares, torch.eye(3, dtype=torch.float64).repeat(UNITS, 1, 1))


@pytest.mark.parametrize("heal", [True, False])
def test_diverged_networks_are_treated_as_in_a_synchronous_round(heal: bool) -> None:
    all_jobs = [published(0), published(1, diverged="a loss"), published(2), published(3)]
    rows = [each.information or [0.0] * UNITS for each in all_jobs]
    matrix = torch.tensor(rows, dtype=torch.float64)
    whole = without_diverged(Graft().decide(matrix, 4), {1}, heal=heal)
    for network, own in enumerate(all_jobs):
        others = [each for each in all_jobs if each is not own]
        decided = decide_among(Graft(), own, others, rate=1.0, heal=heal)
        mixing = decided.for_population(4)
        assert decided.diverged == {1: "a loss"}
        assert mixing.donors[network] == whole.donors[network]
        assert torch.equal(mixing.shares[:, network], whole.shares[:, network])


def test_all_diverged_is_an_error() -> None:
    one, two = (published(network, diverged="a loss") for network in range(2))
    with pytest.raises(NonFiniteError, match=r"network 0 has a loss; network 1 has a loss"):
        decide_among(Graft(), one, [two], rate=1.0, heal=True)


def test_a_rule_that_swaps_scalars_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Wash needs all networks .* use 'all_gather' or"):
        decide_among(Wash(), published(0), [published(1)], rate=1.0, heal=True)
