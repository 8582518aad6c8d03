"""The network that a diverged network copies."""

from __future__ import annotations

import pytest
import torch

from dist_graft import Average, Graft, Wash
from dist_graft.grafting.divergence import healer, without_diverged
from dist_graft.grafting.topology import exponential, random_derangement, ring


def from_one(donors: list[int]) -> list[tuple[int, ...]]:
    return [(donor,) for donor in donors]


def from_all(networks: int) -> list[tuple[int, ...]]:
    return [tuple(j for j in range(networks) if j != k) for k in range(networks)]


@pytest.mark.parametrize(
    ("diverged", "expected"),
    [
        ({1}, {1: 0}),
        ({0}, {0: 3}),
        ({0, 1}, {0: 3, 1: 3}),
        ({1, 3}, {1: 0, 3: 2}),
        ({0, 1, 3}, {0: 2, 1: 2, 3: 2}),
        ({1, 2, 3}, {1: 0, 2: 0, 3: 0}),
    ],
)
def test_ring_heals_from_the_nearest_finite_network_upstream(diverged, expected):
    for donors in (from_one(ring(4)), from_all(4), [()] * 4):
        assert {k: healer(donors, k, diverged) for k in diverged} == expected


def test_donor_of_the_round_takes_precedence_over_the_ring():
    donors = from_one([2, 3, 1, 0])
    assert healer(donors, 0, {0}) == 2
    assert healer(donors, 0, {0, 2}) == 1
    assert healer(donors, 0, {0, 2, 1}) == 3


def test_cyclic_donors_fall_back_to_the_ring():
    donors = from_one(exponential(4, 1))
    assert donors == [(2,), (3,), (0,), (1,)]
    assert healer(donors, 0, {0, 2}) == 3
    assert healer(donors, 2, {0, 2}) == 1
    assert healer(donors, 0, {0, 2, 3}) == 1


def test_donor_that_leads_into_a_cycle_falls_back_to_the_ring():
    """The network itself is not part of the cycle."""
    donors = from_one([1, 2, 1, 0])
    assert healer(donors, 0, {0, 1, 2}) == 3
    assert healer(donors, 3, {0, 1, 3}) == 2


def test_several_donors_fall_back_to_the_ring():
    donors = [(1,), (2, 3), (3,), (0, 1)]
    assert healer(donors, 0, {0, 1}) == 3
    assert healer(donors, 0, {0, 1, 3}) == 2
    assert healer(donors, 2, {2, 3}) == 1


@pytest.mark.parametrize("round_", range(6))
def test_every_topology_finds_the_only_finite_network(round_):
    for donors in (ring(5), exponential(5, round_), random_derangement(5, round_, 7)):
        for finite in range(5):
            diverged = set(range(5)) - {finite}
            assert all(healer(from_one(donors), k, diverged) == finite for k in diverged)


@pytest.mark.parametrize("networks", [1, 2, 4])
def test_no_healer_if_all_networks_diverged(networks):
    diverged = set(range(networks))
    for donors in (from_one(ring(networks)) if networks > 1 else [()], from_all(networks)):
        with pytest.raises(ValueError, match="all networks diverged: there are no weights to copy"):
            healer(donors, 0, diverged)


@pytest.mark.parametrize("heal", [True, False])
@pytest.mark.parametrize("networks", [1, 2, 4])
@pytest.mark.parametrize("rule", [Graft(), Average(), Wash()], ids=repr)
def test_no_mixing_if_all_networks_diverged(rule, networks, heal):
    mixing = rule.decide(torch.rand(networks, 2, dtype=torch.float64), 0)
    with pytest.raises(ValueError, match="all networks diverged"):
        without_diverged(mixing, set(range(networks)), heal=heal)
