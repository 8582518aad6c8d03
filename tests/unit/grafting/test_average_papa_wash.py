"""Constant and shuffled coefficients, averaging, PAPA and WASH against numpy."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from dist_graft import Average, Graft, GraftUnit, Papa, Wash, mix
from dist_graft.grafting.mixing import ScalarSwap, bernoulli_positions

UNITS = [
    GraftUnit(name="a", tensors=("a.weight", "a.bias"), lead="a.weight"),
    GraftUnit(
        name="b",
        tensors=("b.weight", "b.running_mean"),
        lead="b.weight",
        buffers=frozenset({"b.running_mean"}),
    ),
    GraftUnit(name="c", tensors=("c.weight", "c.scale"), lead="c.weight"),
]
SHAPES = {
    "a.weight": (3, 2, 3, 3),
    "a.bias": (3,),
    "b.weight": (5, 3, 2, 2),
    "b.running_mean": (40,),
    "c.weight": (4, 5, 1, 1),
    "c.scale": (),
}
Arrays = list[dict[str, np.ndarray]]


def population(networks: int) -> Arrays:
    random = np.random.default_rng(networks)
    return [
        {key: random.standard_normal(shape) for key, shape in SHAPES.items()}
        for _ in range(networks)
    ]


def random_information(networks: int, units: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).random((networks, units)))


def mixed(arrays: Arrays, mixing) -> Arrays:
    states = [{key: torch.tensor(value) for key, value in one.items()} for one in arrays]
    return [
        {key: value.numpy() for key, value in one.items()} for one in mix(states, UNITS, mixing)
    ]


def assert_close(first: Arrays, second: Arrays) -> None:
    for one, other in zip(first, second, strict=True):
        for key in SHAPES:
            np.testing.assert_allclose(one[key], other[key], rtol=0, atol=1e-12)


def means(arrays: Arrays, who: list[list[int]]) -> Arrays:
    return [{key: sum(arrays[k][key] for k in few) / len(few) for key in SHAPES} for few in who]


def own(mixing, networks: int) -> np.ndarray:
    return np.array([mixing.own_share(network) for network in range(networks)])


# Coefficients that do not depend on the information.


@pytest.mark.parametrize("networks", [2, 3, 5])
def test_constant_keeps_one_half(networks):
    arrays = population(networks)
    mixing = Graft(criterion="constant").decide(random_information(networks), 0)
    assert (own(mixing, networks) == 0.5).all()
    assert_close(mixed(arrays, mixing), means(arrays, [[k, k - 1] for k in range(networks)]))


@pytest.mark.parametrize("networks", [2, 4])
def test_shuffled_permutes_the_units_of_all_networks_equally(networks):
    information = random_information(networks, 30)
    plain = own(Graft().decide(information, 0), networks)
    orders = []
    for round_ in (0, 1, 2):
        rule = Graft(criterion="shuffled", seed=3)
        shuffled = own(rule.decide(information, round_), networks)
        order = [int(np.flatnonzero(plain[0] == value)[0]) for value in shuffled[0]]
        assert sorted(order) == list(range(30))
        assert (shuffled == plain[:, order]).all()
        assert (own(rule.decide(information, round_), networks) == shuffled).all()
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    assert tuple(range(30)) not in orders


def test_shuffle_depends_on_the_seed():
    information = random_information(2, 30)
    kept = {
        tuple(Graft(criterion="shuffled", seed=seed).decide(information, 0).own_share(0))
        for seed in range(4)
    }
    assert len(kept) == 4


@pytest.mark.parametrize("criterion", ["constant", "shuffled"])
def test_controls_measure_entropy(criterion):
    state = {key: torch.tensor(value) for key, value in population(1)[0].items()}
    expected = Graft().measure(UNITS, state)
    assert expected.dtype == torch.float64
    assert torch.equal(Graft(criterion=criterion).measure(UNITS, state), expected)


# Means.


@pytest.mark.parametrize("rule", [Average(), Papa(variant="all"), Papa(beta=0.0)], ids=str)
@pytest.mark.parametrize("networks", [1, 2, 3, 6])
def test_every_network_becomes_the_mean(networks, rule):
    arrays = population(networks)
    mixing = rule.decide(no_information(rule, networks), 3)
    assert_close(mixed(arrays, mixing), means(arrays, [list(range(networks))] * networks))


def no_information(rule, networks: int) -> torch.Tensor:
    """Information of a rule that needs none: a zero for each unit."""
    rows = [rule.measure(UNITS, {}) for _ in range(networks)]
    assert all(row.tolist() == [0.0] * 3 and row.dtype == torch.float64 for row in rows)
    return torch.stack(rows)


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("beta", [0.99, 0.6, 1.0])
@pytest.mark.parametrize("networks", [1, 2, 5])
def test_papa_pulls_toward_the_mean(networks, beta, rate):
    """theta <- (1 - rate (1 - beta)) theta + rate (1 - beta) mean."""
    arrays = population(networks)
    mean = means(arrays, [list(range(networks))])[0]
    pull = rate * (1 - beta)
    expected = [{key: (1 - pull) * one[key] + pull * mean[key] for key in SHAPES} for one in arrays]
    mixing = Papa(beta=beta).decide(random_information(networks), 0).scaled(rate)
    assert_close(mixed(arrays, mixing), expected)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("networks", [2, 3, 6])
def test_papa_pairs_are_means_of_two(networks, rate):
    arrays = population(networks)
    rule = Papa(variant="pairs", seed=1)
    for round_ in range(4):
        mixing = rule.decide(random_information(networks), round_)
        pairs = []
        for network in range(networks):
            row = mixing.shares[0, network].tolist()
            pairs.append([k for k, share in enumerate(row) if share])
            assert [row[k] for k in pairs[-1]] == [0.5, 0.5]
            assert (mixing.shares[:, network] == mixing.shares[0, network]).all()
        assert networks == 2 or len({tuple(pair) for pair in pairs}) == networks
        expected = [
            {key: (1 - rate) * old[key] + rate * new[key] for key in SHAPES}
            for old, new in zip(arrays, means(arrays, pairs), strict=True)
        ]
        assert_close(mixed(arrays, mixing.scaled(rate)), expected)


def test_papa_draws_new_pairs_in_every_round():
    def pairs(round_: int, seed: int) -> tuple[tuple[int, ...], ...]:
        shares = Papa(variant="pairs", seed=seed).decide(random_information(5), round_).shares[0]
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in shares)

    drawn = [pairs(round_, 0) for round_ in range(60)]
    assert drawn == [pairs(round_, 0) for round_ in range(60)]
    assert len(set(drawn)) > 50
    assert drawn[0] != pairs(0, 1)
    assert len({pair for every in drawn for pair in every}) == 10  # of 5 choose 2


def test_papa_pairs_of_a_single_network():
    assert Papa(variant="pairs").decide(random_information(1), 0).own_share(0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rate_out_of_range_is_an_error(rate):
    text = re.escape(f"rate must be in [0, 1], got {rate!r}")
    with pytest.raises(ValueError, match=text):
        Average().decide(random_information(2), 0).scaled(rate)


def test_scaling_multiplies_the_donors_shares():
    plain = Graft().decide(random_information(3), 0)
    scaled = plain.scaled(0.25)
    assert scaled.donors == plain.donors
    for network in range(3):
        for donor in range(3):
            if donor != network:
                assert scaled.shares[:, network, donor].tolist() == pytest.approx(
                    (0.25 * plain.shares[:, network, donor]).tolist(), abs=1e-15
                )
    np.testing.assert_allclose(scaled.shares.sum(dim=2).numpy(), 1.0, atol=1e-15)


# WASH.


def shuffle(networks: int, *, p: float = 0.5, seed: int = 0, round_: int = 0, units: int = 3):
    mixing = Wash(probability=p, seed=seed).decide(random_information(networks, units), round_)
    assert isinstance(mixing, ScalarSwap)
    return mixing


@pytest.mark.parametrize("units", [1, 2, 3, 20])
def test_wash_probability_decreases_linearly_to_the_last_layer(units):
    expected = [0.3] if units == 1 else [0.3 * (1 - k / (units - 1)) for k in range(units)]
    mixing = shuffle(4, p=0.3, units=units)
    assert list(mixing.probability) == pytest.approx(expected, abs=1e-15)
    # A chosen scalar stays with its network with probability 1/4.
    kept = [1 - 0.75 * p for p in expected]
    for network in range(4):
        assert mixing.own_share(network) == pytest.approx(kept)


@pytest.mark.parametrize("networks", [1, 2, 3, 5])
def test_wash_permutes_only_the_chosen_scalars_of_parameters(networks):
    arrays = population(networks)
    mixing = shuffle(networks, p=0.6)
    after = mixed(arrays, mixing)
    moved = 0
    for index, unit in enumerate(UNITS):
        for key in unit.tensors:
            before = np.stack([one[key].reshape(-1) for one in arrays])
            expected = before.copy()
            positions, sources = mixing.chosen_scalars(index, key, before.shape[1])
            if key in unit.buffers:
                positions, sources = positions[:0], sources[:0]
            for position, row in zip(positions.tolist(), sources.tolist(), strict=True):
                assert sorted(row) == list(range(networks))
                for network, source in enumerate(row):
                    expected[network, position] = before[source, position]
            found = np.stack([one[key].reshape(-1) for one in after])
            assert (found == expected).all(), key
            assert (np.sort(found, axis=0) == np.sort(before, axis=0)).all(), key
            moved += int((found != before).sum())
    assert moved > 0 or networks == 1


def test_wash_chooses_scalars_with_the_probability_of_their_unit():
    mixing, count = shuffle(3, p=0.4, units=5), 20_000
    for unit, p in enumerate((0.4, 0.3, 0.2, 0.1, 0.0)):
        positions, sources = mixing.chosen_scalars(unit, f"{unit}.weight", count)
        assert abs(len(positions) - p * count) <= 4 * math.sqrt(count * p * (1 - p))
        assert sources.shape == (len(positions), 3)


def test_wash_permutations_are_uniform():
    """6 of three networks, 12,000 scalars."""
    _, sources = shuffle(3, p=0.999999).chosen_scalars(0, "a.weight", 12_000)
    assert len(sources) > 11_900
    _, counts = np.unique(sources.numpy(), axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 2000) ** 2 / 2000).sum() < 21  # 5 degrees of freedom: 0.1 %


def test_wash_choice_depends_only_on_seed_round_and_key():
    def choice(key: str = "a.weight", **given: int) -> list[list[int]]:
        positions, sources = shuffle(3, **given).chosen_scalars(0, key, 500)
        return [positions.tolist(), sources.flatten().tolist()]

    assert choice() == choice()
    different = [choice(), choice(seed=1), choice(round_=1), choice("a.bias")]
    assert all(one not in different[:index] for index, one in enumerate(different))


@pytest.mark.parametrize("probability", [1e-4, 0.01, 0.3, 0.9])
def test_bernoulli_positions_are_independent_trials(probability):
    count, repeats = 4000, 60
    total, squares, first_half = 0, 0.0, 0
    for seed in range(repeats):
        found = bernoulli_positions(count, probability, torch.Generator().manual_seed(seed))
        assert found.dtype == torch.int64
        places = found.numpy()
        assert (np.diff(places) > 0).all()
        assert ((places >= 0) & (places < count)).all()
        total += len(places)
        squares += (len(places) - count * probability) ** 2
        first_half += int((places < count // 2).sum())
    variance = count * probability * (1 - probability)
    assert abs(total - repeats * count * probability) <= 4 * math.sqrt(repeats * variance)
    assert abs(2 * first_half - total) <= 4 * math.sqrt(max(1.0, total))
    assert 0.4 * variance < squares / repeats < 2 * variance


def test_bernoulli_positions_with_extreme_probabilities():
    draw = torch.Generator().manual_seed(0)
    assert bernoulli_positions(100, 0.0, draw).tolist() == []
    assert bernoulli_positions(0, 0.5, draw).tolist() == []
    assert set(bernoulli_positions(3, 1e-12, draw).tolist()) <= {0, 1, 2}


def test_wash_probability_of_1_chooses_every_scalar():
    draw = torch.Generator().manual_seed(0)
    assert bernoulli_positions(7, 1.0, draw).tolist() == list(range(7))
    positions, _ = shuffle(3, p=1.0).chosen_scalars(0, "a.weight", 50)
    assert positions.tolist() == list(range(50))


def test_bernoulli_positions_reach_both_ends():
    draws = [bernoulli_positions(5, 0.5, torch.Generator().manual_seed(s)) for s in range(400)]
    hits = np.bincount(torch.cat(draws).numpy(), minlength=5)
    assert (abs(hits - 200) < 50).all(), hits


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Papa(beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda: Papa(beta=math.nan), r"beta must be in \[0, 1\], got nan"),
        (lambda: Papa(variant="some"), "variant must be pull, all or pairs, got 'some'"),
        (lambda: Wash(probability=-0.1), r"probability must be in \[0, 1\], got -0.1"),
    ],
)
def test_option_out_of_range_is_an_error(build, text):
    with pytest.raises(ValueError, match=text):
        build()
