"""`mix`, the round of a population in a single process, against numpy."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_graft import Average, Graft, Mixing, Papa, Wash, graft_units, mix
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.mixing import blend_


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
    model[1].num_batches_tracked.fill_(seed)
    model[1].running_mean.normal_()
    return model


UNITS = graft_units(network(0))


def states(networks: int) -> list[dict[str, Tensor]]:
    return [network(seed).state_dict() for seed in range(networks)]


def shares(*rows: list[float], units: int = 1) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).repeat(units, 1, 1)


@pytest.mark.parametrize("networks", [1, 2, 3, 6])
def test_ring_mixes_two_networks_by_the_coefficient(networks):
    before = states(networks)
    information = torch.rand(networks, 2, dtype=torch.float64) * 3
    mixing = Graft().decide(information, 0)
    after = mix(before, UNITS, mixing)
    for k in range(networks):
        donor = (k - 1) % networks
        assert list(after[k]) == list(before[k])
        for unit, kept in zip(UNITS, mixing.own_share(k), strict=True):
            for key in unit.tensors:
                own, other = (before[n][key].double().numpy() for n in (k, donor))
                expected = kept * own + (1 - kept) * other
                np.testing.assert_allclose(after[k][key].numpy(), expected, rtol=1e-5, atol=1e-7)
        assert after[k]["1.num_batches_tracked"] == k


@pytest.mark.parametrize("networks", [2, 3, 4, 7])
def test_equal_shares_give_the_mean(networks):
    before = states(networks)
    members = range(networks)
    mixing = Mixing(
        shares=torch.full((2, networks, networks), 1 / networks, dtype=torch.float64),
        donors=tuple(tuple(j for j in members if j != k) for k in members),
    )
    for k, after in enumerate(mix(before, UNITS, mixing)):
        for key in (key for unit in UNITS for key in unit.tensors):
            mean = torch.stack([state[key].double() for state in before]).mean(dim=0)
            torch.testing.assert_close(after[key].double(), mean, rtol=1e-5, atol=1e-7)
        assert after["1.num_batches_tracked"] == k


def test_donors_are_used_as_they_were_before_the_round():
    """Sequential blending would let network 1 pass on the weights it has just received."""
    (unit,) = graft_units(nn.Conv2d(1, 3, 1, bias=False))
    before = [{"weight": torch.full((3,), float(k))} for k in range(3)]
    mixing = Mixing(shares=shares([0, 0, 1], [1, 0, 0], [0, 1, 0]), donors=((2,), (0,), (1,)))
    after = [state["weight"].tolist() for state in mix(before, [unit], mixing)]
    assert after == [[2.0] * 3, [0.0] * 3, [1.0] * 3]


def test_each_unit_has_its_own_shares():
    before = states(2)
    own = torch.eye(2, dtype=torch.float64)
    mixing = Mixing(shares=torch.stack([own, 1 - own]), donors=((1,), (0,)))
    first, second = mix(before, UNITS, mixing)
    for key in UNITS[0].tensors:
        assert torch.equal(first[key], before[0][key])
        assert torch.equal(second[key], before[1][key])
    for key in UNITS[1].tensors:
        assert torch.equal(first[key], before[1][key])
        assert torch.equal(second[key], before[0][key])


def test_arguments_are_neither_changed_nor_aliased():
    before = states(2)
    kept = copy.deepcopy(before)
    mixing = Graft().decide(torch.rand(2, 2, dtype=torch.float64), 0)
    after = mix(before, UNITS, mixing)
    for k in range(2):
        for key, value in before[k].items():
            assert torch.equal(value, kept[k][key])
            assert after[k][key].data_ptr() != value.data_ptr()


def test_memory_format_and_dtype_are_preserved():
    before = [
        network(seed).to(memory_format=torch.channels_last, dtype=torch.bfloat16).state_dict()
        for seed in range(2)
    ]
    mixing = Graft().decide(torch.rand(2, 2, dtype=torch.float64), 0)
    for state, after in zip(before, mix(before, UNITS, mixing), strict=True):
        for key, value in after.items():
            assert value.dtype == state[key].dtype
            assert value.stride() == state[key].stride()


def test_parameters_that_require_gradients_are_accepted():
    before = [dict(network(seed).state_dict(keep_vars=True)) for seed in range(2)]
    after = mix(before, UNITS, Graft().decide(torch.rand(2, 2, dtype=torch.float64), 0))
    assert not any(value.requires_grad for state in after for value in state.values())


def tied_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


def test_mixed_state_dict_with_tied_weights_can_be_loaded():
    """Every key of a tied tensor must hold the new value: load_state_dict keeps the last one."""
    models = [tied_network(seed) for seed in range(2)]
    units = graft_units(models[0])
    mixing = Graft().decide(torch.rand(2, len(units), dtype=torch.float64), 0)
    for model, after in zip(
        models, mix([m.state_dict() for m in models], units, mixing), strict=True
    ):
        expected = after["0.weight"].clone()
        model.load_state_dict(after)
        assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize(("networks", "units"), [(3, 2), (1, 2), (2, 1), (2, 3)])
def test_wrong_number_of_networks_or_units_is_an_error(networks, units):
    mixing = Graft().decide(torch.rand(networks, units, dtype=torch.float64), 0)
    text = f"for {networks} networks and {units} units, got 2 states and 2 units"
    with pytest.raises(ValueError, match=text):
        mix(states(2), UNITS, mixing)


@pytest.mark.parametrize(
    ("value", "donors", "text"),
    [
        (shares([1, 0], [0, 1])[0], ((), ()), "shares must be [units, 2, 2] for 2 networks"),
        (shares([1, 0], [0, 1]), ((), (), ()), "shares must be [units, 3, 3] for 3 networks"),
        (shares([1, 0], [0, 1]).float(), ((), ()), "shares must be float64 on the CPU"),
        (shares([1.5, -0.5], [0, 1]), ((1,), ()), "shares must be in [0, 1]"),
        (shares([float("nan"), 0], [0, 1]), ((1,), ()), "shares must be in [0, 1]"),
        (shares([0.5, 0.4], [0, 1]), ((1,), ()), "the shares of each row must add up to 1"),
        (shares([1, 0], [0, 1]), ((0,), ()), "network 0 must have distinct donors"),
        (shares([0.5, 0.5], [0, 1]), ((1, 1), ()), "network 0 must have distinct donors"),
        (shares([1, 0], [0.5, 0.5]), ((1,), ()), "network 1 has a share of a network that"),
        (shares([1, 0], [0, 1]), ((), (2,)), "network 1 "),
        (shares([1, 0], [0, 1]), ((), (-2,)), "network 1 "),
    ],
    ids=[
        "two_dimensions",
        "three_networks",
        "float32",
        "negative",
        "nan",
        "sum",
        "itself",
        "twice",
        "no_donor",
        "donor_beyond_the_last",
        "donor_below_the_first",
    ],
)
def test_invalid_mixing_is_an_error(value, donors, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Mixing(shares=value, donors=donors)


def test_sequential_fractions_give_the_shares():
    mixing = Mixing(
        shares=shares([0.1, 0.2, 0.3, 0.4], *torch.eye(4)[1:].tolist()),
        donors=((1, 2, 3), (), (), ()),
    )
    kept, given = 1.0, {}
    for donor, (fraction,) in zip(mixing.donors[0], mixing.fractions(0), strict=True):
        given = {other: share * (1 - fraction) for other, share in given.items()}
        given[donor] = fraction
        kept *= 1 - fraction
    assert kept == pytest.approx(0.1)
    assert given == pytest.approx({1: 0.2, 2: 0.3, 3: 0.4})
    assert mixing.own_share(0) == [0.1]
    assert mixing.networks == 4


def test_last_fraction_equals_the_share():
    mixing = Mixing(shares=shares([0.9, 0.1], [0.7, 0.3]), donors=((1,), (0,)))
    assert mixing.fractions(0) == [[0.1]]
    assert mixing.fractions(1) == [[0.7]]


def test_donor_without_a_share_gives_no_nan():
    mixing = Mixing(
        shares=shares([0, 0, 1], [0.5, 0.5, 0], [0, 0, 1]), donors=((1, 2), (0, 2), (0, 1))
    )
    assert mixing.fractions(0) == [[0.0], [1.0]]
    assert mixing.fractions(1) == [[0.5], [0.0]]
    assert mixing.fractions(2) == [[0.0], [0.0]]


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 0.25), (0.75, 0.75), (1.0, 1.0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blend_changes_only_the_recipient(fraction, expected, dtype):
    recipient = nn.Parameter(torch.zeros(3, dtype=dtype))
    donor, there = torch.ones(3, dtype=dtype), recipient.data_ptr()
    blend_([recipient], [donor], [fraction])
    assert recipient.tolist() == [expected] * 3
    assert recipient.data_ptr() == there
    assert (donor == 1).all()


def test_fraction_of_1_copies_the_donor():
    """Across memory formats, and without leaving any NaN or infinity of the recipient."""
    recipient = torch.tensor([math.nan, math.inf, -math.inf, 3e38, 1.0, -0.0]).view(2, 3).t()
    donor = torch.tensor([1e-45, -0.0, -3e38, 3.0, 4.0, 5.0]).view(3, 2)
    blend_([recipient], [donor], [1.0])
    assert recipient.tolist() == donor.tolist()
    assert math.copysign(1, recipient[0, 1]) == -1
    assert recipient.stride() == (1, 3)


def test_mean_fractions() -> None:
    """How far each unit moves toward the mean, or None for a mixing that is no mean."""
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    assert Average().decide(zeros, 0).mean_fractions() == [1.0, 1.0]
    pull = Papa(beta=0.9).decide(zeros, 0)
    assert pull.mean_fractions() == pytest.approx([0.1, 0.1])
    assert pull.scaled(0.5).mean_fractions() == pytest.approx([0.05, 0.05])
    for rule in (Graft(), Papa(variant="pairs"), Wash()):
        assert rule.decide(zeros, 0).mean_fractions() is None
    assert Average().decide(zeros[:1], 0).mean_fractions() is None
    assert without_diverged(Average().decide(zeros, 0), {1}, heal=True).mean_fractions() is None
    swapped = Mixing(shares=1 - torch.eye(2, dtype=torch.float64)[None], donors=((1,), (0,)))
    assert swapped.mean_fractions() is None


def test_mean_fractions_describe_the_mixing() -> None:
    networks = [{"0.weight": torch.randn(4, 2, 1, 1, dtype=torch.float64)} for _ in range(5)]
    units = graft_units(nn.Sequential(nn.Conv2d(2, 4, 1, bias=False)))
    mixing = Papa(beta=0.3).decide(torch.zeros(5, 1, dtype=torch.float64), 0)
    (fraction,) = mixing.mean_fractions() or ()
    mean = torch.stack([network["0.weight"] for network in networks]).mean(dim=0)
    for before, after in zip(networks, mix(networks, units, mixing), strict=True):
        torch.testing.assert_close(
            after["0.weight"], torch.lerp(before["0.weight"], mean, fraction)
        )
