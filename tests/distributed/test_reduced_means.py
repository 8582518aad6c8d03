"""Rounds that compute the population mean by all-reduce, as over NCCL, against `mix`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from architectures import build, disturb_, same_bits, snapshot
from harness import RankContext, result_or_error, run
from rounds import Round

from dist_graft import Average, Graft, Grafter, Papa, Rule, graft_units, mix
from dist_graft.grafting.multi_tensor import forced_multi_tensor
from dist_graft.grafting.units import graft_tensors

RULES: dict[str, Rule] = {"average": Average(), "papa": Papa(beta=0.8), "graft": Graft()}
ROUNDS = 2


class Reducing(Grafter):
    """Grafter that all-reduces means over gloo, too."""

    def _reduces_means(self, device: torch.device) -> bool:
        del device
        return True


@dataclass(frozen=True)
class Case:
    rule: str
    architecture: str
    bucket_bytes: int = 252
    rate: float = 1.0

    def __str__(self) -> str:
        return f"{self.rule}-{self.architecture}-{self.bucket_bytes}-{self.rate:g}"


CASES = (
    Case("average", "channels_last"),
    Case("average", "mixed_types"),
    Case("papa", "mixed_types", rate=0.3),
    Case("papa", "grouped", 1 << 20),
    Case("graft", "plain"),
)


def play(context: RankContext) -> dict[str, list[Round]]:
    played = {}
    for case in CASES:
        model = build(case.architecture, context.rank)
        grafter = Reducing(model, rule=RULES[case.rule], bucket_mb=case.bucket_bytes / 2**20)
        rounds = []
        for number in range(ROUNDS):
            before = snapshot(model)
            with forced_multi_tensor():
                record = grafter.graft(rate=case.rate)
            rounds.append(Round(before, snapshot(model), record))
            disturb_(model, context.networks * (number + 1) + context.rank)
        played[str(case)] = rounds
    return played


@cache
def population(networks: int) -> list[dict[str, list[Round]]]:
    return run(play, networks)


def rounds_of(networks: int, case: Case) -> list[tuple[Round, ...]]:
    """[round][network] of a case."""
    return list(zip(*(one[str(case)] for one in population(networks)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_round_equals_mix_within_k_ulps(networks: int, case: Case) -> None:
    """ADR 35: K ulps of the largest of the K weights; bit for bit where the mixing is no mean."""
    units, rule = graft_units(build(case.architecture, 0)), RULES[case.rule]
    size = sum(
        tensor.numel() * torch.promote_types(tensor.dtype, torch.float32).itemsize
        for tensor in graft_tensors(build(case.architecture, 0)).values()
    )
    for number, round_ in enumerate(rounds_of(networks, case)):
        befores = [one.before for one in round_]
        information = torch.stack([rule.measure(units, before) for before in befores])
        mixing = rule.decide(information, number).scaled(case.rate)
        expected = mix(befores, units, mixing)
        for network, one in enumerate(round_):
            for key, value in one.after.items():
                largest = torch.stack([before[key] for before in befores]).double().abs().amax(0)
                within = (
                    networks * largest * torch.finfo(value.dtype).eps
                    if (value.is_floating_point() and case.rule != "graft")
                    else 0
                )
                apart = (value.double() - expected[network][key].double()).abs()
                assert (apart <= within).all(), (number, network, key)
                assert (
                    case.rule != "average"
                    or same_bits(value, round_[0].after[key])
                    or (not value.is_floating_point())
                )
            for unit in units:
                squares = [
                    (befores[donor][key].double() - befores[network][key].double()).square().sum()
                    for donor in mixing.donors[network]
                    for key in unit.tensors
                ]
                distance = math.sqrt(sum(squares) / len(mixing.donors[network]))
                assert one.record.distance[unit.name] == pytest.approx(distance, rel=1e-5)
            if case.rule != "graft":
                received = 2 * (networks - 1) * size // networks
                assert one.record.bytes_received == received


def differ(context: RankContext) -> object:
    grafter = (Reducing if context.rank else Grafter)(build("plain", 0), rule=Average())
    return result_or_error(grafter.graft)


def test_a_rank_that_does_not_reduce_is_an_error_on_every_rank() -> None:
    errors = run(differ, 2)
    assert [kind for kind, _ in errors] == ["DisagreementError"] * 2
    assert "all_reduce is False in network 0 and True in network 1" in errors[0][1]
