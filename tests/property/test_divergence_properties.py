"""Properties of rounds with diverged networks, for every rule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_graft import Average, Graft, Papa, Rule, Wash, graft_units, mix
from dist_graft.grafting.divergence import healer, without_diverged
from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.filter_graft import FilterGraft, filter_links
from dist_graft.grafting.units import graft_tensors

State = dict[str, Tensor]

MODEL = nn.Sequential(
    nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)
).double()
UNITS = graft_units(MODEL)
KEYS = [key for unit in UNITS for key in unit.tensors]
LINKS = filter_links(UNITS, graft_tensors(MODEL))
RULES: dict[str, Rule] = {
    "graft ring": Graft(),
    "graft random": Graft(topology="random", seed=2),
    "graft exponential": Graft(topology="exponential"),
    "graft all or nothing": Graft(amplitude=1.0, sensitivity=1e300),
    "filter ring": FilterGraft(links=LINKS),
    "filter random": FilterGraft(links=LINKS, topology="random", seed=1),
    "average": Average(),
    "papa": Papa(beta=0.7),
    "papa without a pull": Papa(beta=1.0),
    "papa all": Papa(variant="all"),
    "papa pairs": Papa(variant="pairs", seed=4),
    "wash": Wash(probability=0.8, seed=3),
    "wash of every scalar": Wash(probability=1.0),
}


def filled(seed: int) -> State:
    draw = np.random.default_rng(seed)
    return {
        key: torch.from_numpy(draw.standard_normal(tuple(value.shape)))
        if value.is_floating_point()
        else torch.tensor(seed)
        for key, value in MODEL.state_dict().items()
    }


def information_of(rule: Rule, states: list[State], diverged: set[int]) -> Tensor:
    """Information of each network; zeros for diverged ones."""
    rows = [rule.measure(UNITS, state).double() for state in states]
    return torch.stack([row * (network not in diverged) for network, row in enumerate(rows)])


def corrupt(state: State, keys: list[str], where: slice | int, value: float) -> None:
    for key in keys:
        state[key].view(-1)[where] = value


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[State], Mixing, set[int]]:
    """Populations with diverged networks, and the mixing that a rule decides."""
    networks = draw(st.integers(2, 5))
    states = [filled(draw(st.integers(0, 10_000))) for _ in range(networks)]
    diverged = draw(st.sets(st.sampled_from(range(networks)), max_size=networks - 1))
    rule = RULES[draw(st.sampled_from(sorted(RULES)))]
    mixing = rule.decide(information_of(rule, states, diverged), draw(st.integers(0, 4)))
    mixing = mixing.scaled(draw(st.sampled_from([1.0, 1.0, 0.5, 0.0])))
    for network in diverged:
        corrupt(
            states[network],
            draw(st.sampled_from([KEYS, KEYS[:1], KEYS[-1:]])),
            draw(st.sampled_from([slice(None), 0, -1])),
            draw(st.sampled_from([math.nan, math.inf, -math.inf])),
        )
    return states, mixing, diverged


def weights(planned: Mixing) -> list[list[State]]:
    """Share of each scalar by recipient and donor, found by mixing ones among zeros."""
    networks, zeros = planned.networks, {key: torch.zeros_like(filled(0)[key]) for key in KEYS}
    ones = {key: torch.ones_like(value) for key, value in zeros.items()}
    after = [
        mix([ones if k == donor else zeros for k in range(networks)], UNITS, planned)
        for donor in range(networks)
    ]
    return [[after[donor][network] for donor in range(networks)] for network in range(networks)]


def expected(shares: list[State], states: list[State], diverged: set[int], network: int) -> State:
    """Reference: the remaining networks in proportion, or the network itself if none remains."""
    result = {}
    for key in KEYS:
        total = np.zeros(shares[0][key].shape)
        values = np.zeros(shares[0][key].shape)
        for other in set(range(len(states))) - diverged:
            total += shares[other][key].numpy()
            values += shares[other][key].numpy() * states[other][key].numpy()
        none = total < 1e-9
        own = states[network][key].numpy()
        result[key] = torch.from_numpy(np.where(none, own, values / np.where(none, 1, total)))
    return result


def same_bits(first: State, second: State) -> bool:
    """Bitwise comparison, including NaN."""
    return all(
        torch.equal(first[key].view(torch.int64), second[key].view(torch.int64)) for key in KEYS
    )


def check_donors(planned: Mixing, mixing: Mixing, diverged: set[int], *, heal: bool) -> None:
    """Check that no network takes from a diverged one and that the others follow the rule."""
    assert mixing.networks == planned.networks
    np.testing.assert_allclose(mixing.shares.sum(dim=2).numpy(), 1.0, rtol=0, atol=1e-12)
    for network, donors in enumerate(mixing.donors):
        assert not diverged & set(donors)
        lost = [other for other in diverged if other != network]
        assert not mixing.shares[:, network, lost].any()
        if network not in diverged:
            assert donors == tuple(d for d in planned.donors[network] if d not in diverged)
        elif heal:
            assert donors == (healer(planned.donors, network, diverged),)
        else:
            assert donors == ()


def check_states(
    before: list[State], shares: list[list[State]], mixing: Mixing, diverged: set[int]
) -> None:
    """Check the round against the reference; bitwise where networks are kept or copied."""
    after = mix(before, UNITS, mixing)
    for network in range(mixing.networks):
        if network in diverged:
            (source,) = mixing.donors[network] or (network,)
            assert same_bits(after[network], before[source])
            assert set(mixing.own_share(network)) == {float(source == network)}
            continue
        reference = expected(shares[network], before, diverged, network)
        for key in KEYS:
            assert after[network][key].isfinite().all(), key
            np.testing.assert_allclose(after[network][key], reference[key], rtol=0, atol=2e-6)


@given(rounds(), st.booleans())
def test_diverged_networks_give_nothing(case, heal):
    states, planned, diverged = case
    mixing = without_diverged(planned, diverged, heal=heal)
    check_donors(planned, mixing, diverged, heal=heal)
    check_states(states, weights(planned), mixing, diverged)


@pytest.mark.parametrize("networks", [2, 3, 4, 5])
@pytest.mark.parametrize("name", RULES)
def test_every_set_of_diverged_networks(name, networks):
    rule, finite, shares = RULES[name], [filled(network) for network in range(networks)], None
    for size in range(networks):
        for diverged in map(set, itertools.combinations(range(networks), size)):
            planned = rule.decide(information_of(rule, finite, diverged), 0)
            if shares is None or isinstance(rule, (Graft, FilterGraft)):  # depend on information
                shares = weights(planned)
            states = [{key: value.clone() for key, value in state.items()} for state in finite]
            for network in diverged:
                corrupt(states[network], KEYS, slice(None), math.nan)
            for heal in (True, False):
                mixing = without_diverged(planned, diverged, heal=heal)
                check_donors(planned, mixing, diverged, heal=heal)
            check_states(states, shares, mixing, diverged)


@given(rounds(), st.booleans())
def test_planned_mixing_and_inputs_are_unchanged(case, heal):
    states, planned, diverged = case
    shares, donors = planned.shares.clone(), planned.donors
    kept = [{key: value.clone() for key, value in state.items()} for state in states]
    mix(states, UNITS, without_diverged(planned, diverged, heal=heal))
    assert torch.equal(planned.shares, shares)
    assert planned.donors == donors
    assert all(same_bits(*pair) for pair in zip(states, kept, strict=True))
