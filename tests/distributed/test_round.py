"""Distributed rounds of every architecture against `mix`."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, State, build, lead_of, same_bits
from harness import run
from rounds import Case, Mean, OneGives, Round, play

from dist_graft import Graft, GraftUnit, graft_units, mix
from dist_graft.grafting.units import graft_tensors

SMALL = [name for name in ARCHITECTURES if name != "large"]
RAGGED = 252  # bytes; not aligned with any tensor
EXCHANGES = ("all_gather", "p2p")
CASES = (
    *(Case(name, exchange, RAGGED) for name in SMALL for exchange in EXCHANGES),
    *(Case(name, exchange, 1 << 25) for name in SMALL for exchange in EXCHANGES),
    *(Case("mixed_types", exchange, RAGGED, Mean()) for exchange in EXCHANGES),
    *(Case("mixed_types", exchange, RAGGED, OneGives()) for exchange in EXCHANGES),
    *(Case(name, "all_gather", RAGGED, multi_tensor=True) for name in SMALL),
    *(Case(name, "p2p", 1 << 25, multi_tensor=True) for name in SMALL),
    *(Case("mixed_types", exchange, 1 << 25, Mean(), multi_tensor=True) for exchange in EXCHANGES),
)


@cache
def population(networks: int, cases: tuple[Case, ...] = CASES) -> list[dict[str, list[Round]]]:
    """Run all cases in one launch of the processes."""
    return run(play, networks, list(cases))


def rounds_of(networks: int, case: Case) -> list[list[Round]]:
    """[round][network] of a case."""
    played = population(networks) if case in CASES else population(networks, (case,))
    return [list(round_) for round_ in zip(*(one[str(case)] for one in played), strict=True)]


@cache
def units_of(architecture: str) -> list[GraftUnit]:
    return graft_units(build(architecture, 0), lead=lead_of(architecture))


@cache
def size_of(architecture: str) -> int:
    """Bytes of all tensors that a round blends."""
    tensors = graft_tensors(build(architecture, 0)).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def information_of(states: list[State], case: Case) -> torch.Tensor:
    rule = case.rule or Graft()
    units = units_of(case.architecture)
    return torch.stack([rule.measure(units, state) for state in states])


def check_case(networks: int, case: Case) -> None:
    """Check the weights, records and storage of every round of a case."""
    tied_again = {"2.weight"} if case.architecture == "tied" else set()
    for number, round_ in enumerate(rounds_of(networks, case)):
        befores = [one.before for one in round_]
        information = information_of(befores, case)
        mixing = (case.rule or Graft()).decide(information, number)
        expected = mix(befores, units_of(case.architecture), mixing)
        for network, one in enumerate(round_):
            for key, value in one.after.items():
                if key not in tied_again:
                    assert same_bits(value, expected[network][key]), (number, network, key)
            assert not one.moved
            check_record(network, number, one, case, befores, information)


def check_record(
    network: int,
    number: int,
    one: Round,
    case: Case,
    befores: list[State],
    information: torch.Tensor,
) -> None:
    units, record = units_of(case.architecture), one.record
    names = [unit.name for unit in units]
    mixing = (case.rule or Graft()).decide(information, number)
    donors = mixing.donors[network]
    assert record.round == number
    assert record.donor == (donors[0] if donors else (network - 1) % len(befores))
    for entry in (record.coefficient, record.information, record.distance):
        assert list(entry) == names
    assert list(record.coefficient.values()) == mixing.own_share(network)
    assert list(record.information.values()) == information[network].tolist()
    for unit in units:
        squares = [
            (befores[donor][key].double() - befores[network][key].double()).square().sum()
            for donor in donors
            for key in unit.tensors
        ]
        apart = math.sqrt(sum(squares) / len(donors)) if donors else 0.0
        assert record.distance[unit.name] == pytest.approx(apart, rel=1e-5)
    senders = len(donors) if case.exchange == "p2p" else len(befores) - 1
    assert record.bytes_received == senders * size_of(case.architecture)
    assert set(record.phase_seconds) == {
        "measure",
        "agree",
        "pack",
        "exchange",
        "distance",
        "blend",
    }
    assert 0 < sum(record.phase_seconds.values()) <= record.seconds


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("networks", [1, 2, 3, 4, 5])
def test_round_equals_mix_bit_for_bit(networks, case):
    check_case(networks, case)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_eight_networks(exchange):
    check_case(8, Case("plain", exchange, RAGGED, rounds=3))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_buckets_of_one_element(exchange):
    check_case(2, Case("tied", exchange, 1, rounds=1))


@pytest.mark.parametrize("bucket_bytes", [300_004, 1 << 25], ids=["cut", "whole"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_tensor_larger_than_a_group(exchange, bucket_bytes):
    """148,608 elements, in several buckets and in one."""
    check_case(2, Case("large", exchange, bucket_bytes, rounds=1))
    check_case(2, Case("large", exchange, bucket_bytes, rounds=1, multi_tensor=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.rule is None], ids=str)
def test_two_networks_are_equal_after_a_round(case):
    """With K = 2 the coefficients of a unit add up to 1, so weights are equal up to rounding."""
    blended = {key for unit in units_of(case.architecture) for key in unit.tensors}
    for first, second in rounds_of(2, case):
        for key in blended:
            one, other = first.after[key], second.after[key]
            # An ulp of the larger input, because cancellation keeps the absolute error.
            size = torch.maximum(first.before[key].abs(), second.before[key].abs())
            ulp = torch.finfo(one.dtype).eps * size.double()
            assert ((one.double() - other.double()).abs() <= 2 * ulp).all(), key


def test_three_networks_stay_different():
    for round_ in rounds_of(3, Case("plain", "p2p", RAGGED)):
        for one, other in zip(round_, [*round_[1:], round_[0]], strict=True):
            assert not torch.equal(one.after["0.weight"], other.after["0.weight"])


def test_single_network_is_unchanged():
    for case in CASES:
        for (one,) in rounds_of(1, case):
            assert all(same_bits(one.after[key], one.before[key]) for key in one.before)
            assert set(one.record.coefficient.values()) == {1.0}
            assert one.record.donor == 0
            assert one.record.bytes_received == 0


def test_tied_weights_are_blended_once():
    for networks in (2, 3):
        for one in rounds_of(networks, Case("tied", "p2p", RAGGED))[0]:
            assert same_bits(one.after["0.weight"], one.after["2.weight"])
            assert list(one.record.coefficient) == ["0", "3"]


def test_frozen_tensors_are_blended_and_integers_are_not():
    integers = {"norm.num_batches_tracked", "steps", "mask"}
    for networks in (2, 3):
        for one in rounds_of(networks, Case("norm_first", "all_gather", RAGGED))[0]:
            changed = {
                key for key in one.before if not torch.equal(one.before[key], one.after[key])
            }
            assert changed == set(one.before) - integers - {"nothing"}
            assert "stem.weight" in changed
            assert "norm.running_var" in changed
