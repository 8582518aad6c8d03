from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dist_graft import Graft, entropy, filter_entropy, l1
from dist_graft.grafting.topology import ring


def test_ring_donors():
    assert ring(1) == [0]
    assert ring(2) == [1, 0]
    assert ring(5) == [4, 0, 1, 2, 3]


@pytest.mark.parametrize("networks", [2, 3, 5])
def test_coefficients_are_eq_7(networks):
    information = torch.rand(networks, 4, dtype=torch.float64)
    rule = Graft(amplitude=0.6, sensitivity=20.0)
    mixing = rule.decide(information, 0)
    for k in range(networks):
        donor = (k - 1) % networks
        assert mixing.donors[k] == (donor,)
        for unit in range(4):
            apart = information[k, unit].item() - information[donor, unit].item()
            kept = 0.6 / math.pi * math.atan(20.0 * apart) + 0.5
            row = [0.0] * networks
            row[donor] = 1 - kept
            row[k] = kept
            assert mixing.shares[unit, k].tolist() == pytest.approx(row, abs=1e-12)
        assert mixing.own_share(k) == mixing.shares[:, k, k].tolist()


def test_ring_is_the_same_in_every_round():
    information = torch.rand(3, 2, dtype=torch.float64)
    first, later = Graft().decide(information, 0), Graft().decide(information, 7)
    assert torch.equal(first.shares, later.shares)
    assert first.donors == later.donors


def test_single_network_keeps_itself():
    mixing = Graft().decide(torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0)
    assert mixing.donors == ((),)
    assert mixing.own_share(0) == [1.0, 1.0]
    assert mixing.fractions(0) == []


def test_coefficients_of_two_networks_add_up_to_1():
    mixing = Graft(amplitude=1.0, sensitivity=500.0).decide(
        torch.rand(2, 50, dtype=torch.float64), 0
    )
    both = torch.tensor(mixing.own_share(0)) + torch.tensor(mixing.own_share(1))
    assert both.tolist() == pytest.approx([1.0] * 50, abs=1e-12)


def test_criterion_and_num_bins_are_used():
    filters = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    assert Graft().information(filters) == entropy(filters)
    assert Graft(num_bins=3).information(filters) == entropy(filters, num_bins=3)
    summed = Graft(criterion="filter_entropy", num_bins=4)
    assert summed.information(filters) == filter_entropy(filters, num_bins=4)
    assert Graft(criterion="l1").information(filters) == l1(filters)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (
            {"criterion": "l2"},
            "criterion must be one of entropy, .* or a reference .*, got 'l2'",
        ),
        (
            {"topology": "star"},
            "topology must be one of ring, .* or a reference .*, got 'star'",
        ),
        ({"criterion": "nonesuch:f"}, "criterion 'nonesuch:f': there is no module nonesuch"),
        ({"topology": "math:f"}, "topology 'math:f': math has no function or class 'f'"),
        ({"num_bins": 0}, "num_bins must be at least 1, got 0"),
        ({"amplitude": 2.0}, r"amplitude must be in \[0, 1\], got 2.0"),
        ({"sensitivity": -1.0}, "sensitivity must be finite and at least 0, got -1.0"),
    ],
)
def test_option_out_of_range_is_an_error(option, text):
    with pytest.raises(ValueError, match=text):
        Graft(**option)


def test_defaults_are_those_of_the_second_release():
    assert dataclasses.asdict(Graft()) == {
        "amplitude": 0.4,
        "sensitivity": 5.0,
        "num_bins": 10,
        "criterion": "entropy",
        "topology": "ring",
        "seed": 0,
    }
