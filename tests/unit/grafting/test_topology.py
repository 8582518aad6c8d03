"""Donors of each topology, and the number of rounds until all networks have mixed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft import Graft
from dist_graft.grafting.topology import TOPOLOGIES, exponential, random_derangement, ring

SIZES = st.integers(2, 40)
NUMBERS = st.integers(0, 2**40)


def rounds_to_reach_all(topology, networks: int) -> int:
    """Number of rounds until each network holds weights of all others."""
    holds = [{network} for network in range(networks)]
    for round_ in range(4 * networks):
        if all(len(held) == networks for held in holds):
            return round_
        donors = topology(networks, round_, 0)
        holds = [holds[network] | holds[donors[network]] for network in range(networks)]
    raise AssertionError("not in so many rounds")


@pytest.mark.parametrize("name", TOPOLOGIES)
@given(networks=SIZES, round_=NUMBERS, seed=st.integers(0, 2**62))
def test_every_network_gives_once_and_never_to_itself(name, networks, round_, seed):
    donors = TOPOLOGIES[name](networks, round_, seed)
    assert sorted(donors) == list(range(networks))
    assert all(donor != network for network, donor in enumerate(donors))
    assert TOPOLOGIES[name](networks, round_, seed) == donors


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_single_network_is_its_own_donor(name):
    assert [TOPOLOGIES[name](1, round_, 0) for round_ in range(3)] == [[0]] * 3


@pytest.mark.parametrize("networks", [2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_rounds_until_every_network_has_reached_every_other(networks):
    assert rounds_to_reach_all(exponential, networks) == math.ceil(math.log2(networks))
    assert rounds_to_reach_all(ring, networks) == networks - 1


def held(topology: str, networks: int, rounds: int) -> torch.Tensor:
    """[networks, networks]: share of network j in network i after rounds with alpha = 1/2."""
    rule = Graft(topology=topology, criterion="constant")
    shares = torch.eye(networks, dtype=torch.float64)
    for round_ in range(rounds):
        mixing = rule.decide(torch.zeros(networks, 1, dtype=torch.float64), round_)
        shares = mixing.shares[0] @ shares
    return shares


@pytest.mark.parametrize("networks", [2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_products_of_mixings_are_positive_after_that_many_rounds(networks):
    """K - 1 rounds on the ring, ceil(log2 K) with the exponential topology."""
    fastest = math.ceil(math.log2(networks))
    for name, rounds in (("ring", networks - 1), ("exponential", fastest)):
        assert (held(name, networks, rounds) > 0).all()
        assert not (held(name, networks, rounds - 1) > 0).all()
    assert not (held("random", networks, fastest - 1) > 0).all()


@pytest.mark.parametrize("networks", [2, 4, 8, 16])
def test_shares_after_that_many_rounds(networks):
    """Exponential: equal shares. Ring: 1 / 2^(K - 1) of the most distant network."""
    even = held("exponential", networks, networks.bit_length() - 1)
    assert torch.equal(even, torch.full_like(even, 1 / networks))
    assert held("ring", networks, networks - 1).min() == 2.0 ** (1 - networks)


def test_exponential_distances_rotate():
    assert [exponential(8, round_)[0] for round_ in range(4)] == [7, 6, 4, 7]
    assert [exponential(5, round_)[0] for round_ in range(4)] == [4, 3, 1, 4]
    assert [exponential(2, round_) for round_ in range(2)] == [[1, 0], [1, 0]]


def test_random_donors_are_uniform_over_the_nine_of_four():
    """9 permutations of 4 have no fixed point; 4,500 draws, each expected 500 times."""
    seen = Counter(tuple(random_derangement(4, round_, 1)) for round_ in range(4500))
    assert len(seen) == 9
    chi_squared = sum((count - 500) ** 2 / 500 for count in seen.values())
    assert chi_squared < 26  # 8 degrees of freedom: 0.1 %


def test_random_donors_depend_on_round_and_seed():
    by_round = {tuple(random_derangement(12, round_, 0)) for round_ in range(20)}
    by_seed = {tuple(random_derangement(12, 0, seed)) for seed in range(20)}
    assert len(by_round) == len(by_seed) == 20


def test_graft_follows_its_topology():
    information = torch.rand(5, 3, dtype=torch.float64)
    for name, topology in TOPOLOGIES.items():
        for round_ in range(4):
            mixing = Graft(topology=name, seed=6).decide(information, round_)
            assert [donor for (donor,) in mixing.donors] == topology(5, round_, 6)
