"""Distributed rounds of every rule against `mix`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from architectures import disturb_, places, same_bits, snapshot
from harness import RankContext, result_or_error, run
from rounds import Round
from torch import nn

from dist_graft import (
    Average,
    Graft,
    Grafter,
    GraftUnit,
    Papa,
    Rule,
    Wash,
    graft_units,
    mix,
)
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.mixing import ScalarSwap
from dist_graft.grafting.multi_tensor import forced_multi_tensor
from dist_graft.grafting.rules.filter_graft import FilterGraft, FilterLink, filter_links
from dist_graft.grafting.units import graft_tensors

ROUNDS = 3
EXCHANGES = ("all_gather", "p2p")
RAGGED, WHOLE = 252, 1 << 20


def ragged() -> nn.Module:
    """Grouped, depthwise and transposed convolutions in a chain, channels last."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 8, 2, groups=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 5, 3),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    return model.to(memory_format=torch.channels_last)


def mixed_dtypes() -> nn.Module:
    """Like `ragged`, with layers of different dtypes."""
    model = ragged()
    for index, kind in ((1, torch.float64), (2, torch.bfloat16), (12, torch.float16)):
        model[index].to(kind)
    return model


MODELS = {"ragged": ragged, "mixed_dtypes": mixed_dtypes}


def build(name: str, network: int) -> nn.Module:
    torch.manual_seed(network)
    model = MODELS[name]()
    disturb_(model, network)
    return model


@cache
def units() -> list[GraftUnit]:
    return graft_units(build("ragged", 0))


@cache
def links() -> tuple[FilterLink, ...]:
    return filter_links(units(), graft_tensors(build("ragged", 0)))


RULES: dict[str, Rule] = {
    "ring": Graft(),
    "random": Graft(topology="random", seed=3, amplitude=0.9),
    "exponential": Graft(topology="exponential", criterion="l1", sensitivity=200.0),
    "constant": Graft(criterion="constant"),
    "shuffled": Graft(criterion="shuffled", topology="random", amplitude=1.0, sensitivity=50.0),
    "average": Average(),
    "papa": Papa(beta=0.8),
    "papa-all": Papa(variant="all"),
    "papa-pairs": Papa(variant="pairs", seed=4),
    "wash": Wash(probability=0.3, seed=5),
    "wash-rarely": Wash(probability=0.002),
    "filter": FilterGraft(links=links()),
    "filter-random": FilterGraft(links=links(), topology="random", seed=2),
    "filter-exponential": FilterGraft(links=links(), topology="exponential"),
}
DENSE = ("random", "shuffled", "average", "papa", "papa-all", "papa-pairs")
TYPED = ("random", "average", "papa-pairs", "wash", "filter", "filter-exponential")


@dataclass(frozen=True)
class Case:
    """One rule and how its rounds are run."""

    rule: str
    exchange: str
    model: str = "ragged"
    bucket_bytes: int = RAGGED
    rate: float = 1.0
    lost: str = ""
    """on_divergence for network 1, which diverges before every round; empty: it does not."""
    multi_tensor: bool = False
    """Whether the rounds take the accelerators' branch."""

    def __str__(self) -> str:
        parts = (self.rule, self.exchange, self.model, self.bucket_bytes, self.rate, self.lost)
        return "-".join(map(str, parts)).rstrip("-") + ("-multi" if self.multi_tensor else "")


CASES = (
    *(Case(rule, exchange) for rule in RULES for exchange in EXCHANGES),
    *(Case(rule, exchange, rate=0.3) for rule in DENSE for exchange in EXCHANGES),
    *(Case(rule, exchange, "mixed_dtypes") for rule in TYPED for exchange in EXCHANGES),
    *(Case(rule, "p2p", bucket_bytes=WHOLE) for rule in ("papa-pairs", "wash", "filter-random")),
    *(Case(rule, "all_gather", multi_tensor=True) for rule in RULES),
    *(Case(rule, "p2p", "mixed_dtypes", WHOLE, multi_tensor=True) for rule in TYPED),
)
LOST = (
    *(Case(rule, "p2p", lost="heal") for rule in RULES),
    *(Case(rule, "all_gather", lost="exclude") for rule in RULES),
    *(Case(rule, "all_gather", lost="heal") for rule in ("ring", "papa", "wash", "filter")),
    *(Case(rule, "p2p", lost="exclude") for rule in ("ring", "papa", "wash", "filter")),
    *(
        Case(rule, "p2p", bucket_bytes=WHOLE, lost="heal", multi_tensor=True)
        for rule in ("ring", "papa", "wash", "filter")
    ),
)


def play(context: RankContext, cases: tuple[Case, ...]) -> dict[str, list[Round]]:
    """Run a few rounds of every case, with a perturbation after each round."""
    played = {}
    for case in cases:
        model = build(case.model, context.rank).to(context.device)
        grafter = grafter_of(model, case)
        rounds = []
        for number in range(ROUNDS):
            if case.lost and context.rank == 1:
                with torch.no_grad():
                    model[2].weight[0] = math.nan
            before, there = snapshot(model), places(model)
            with forced_multi_tensor() if case.multi_tensor else nullcontext():
                record = grafter.graft(rate=case.rate)
            rounds.append(Round(before, snapshot(model), record, places(model) != there))
            disturb_(model, context.networks * (number + 1) + context.rank)
        played[str(case)] = rounds
    return played


def grafter_of(model: nn.Module, case: Case) -> Grafter:
    return Grafter(
        model,
        rule=RULES[case.rule],
        exchange=case.exchange,
        bucket_mb=case.bucket_bytes / 2**20,
        on_divergence=case.lost or "raise",
    )


@cache
def population(networks: int) -> list[dict[str, list[Round]]]:
    """Run all cases in one launch of the processes."""
    return run(play, networks, CASES + LOST)


def rounds_of(networks: int, case: Case) -> list[tuple[Round, ...]]:
    """[round][network] of a case."""
    return list(zip(*(one[str(case)] for one in population(networks)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_round_equals_mix_bit_for_bit(networks, case):
    rule = RULES[case.rule]
    for number, round_ in enumerate(rounds_of(networks, case)):
        befores = [one.before for one in round_]
        information = torch.stack([rule.measure(units(), before) for before in befores])
        mixing = rule.decide(information, number)
        if case.rate != 1.0:
            mixing = mixing.scaled(case.rate)
        expected = mix(befores, units(), mixing)
        changed = 0
        for network, one in enumerate(round_):
            for key, value in one.after.items():
                assert same_bits(value, expected[network][key]), (number, network, key)
                changed += not same_bits(value, one.before[key])
            assert not one.moved
            assert one.record.round == number
            assert list(one.record.coefficient.values()) == mixing.own_share(network)
        assert changed > 0 or case.rule == "wash-rarely"


@pytest.mark.parametrize("case", LOST, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_diverged_network_is_healed_or_excluded_as_in_mix(networks, case):
    rule, heal = RULES[case.rule], case.lost == "heal"
    for number, round_ in enumerate(rounds_of(networks, case)):
        befores = [one.before for one in round_]
        information = [rule.measure(units(), before) for k, before in enumerate(befores) if k != 1]
        information.insert(1, torch.zeros_like(information[0]))  # a diverged network sends zeros
        mixing = without_diverged(rule.decide(torch.stack(information), number), {1}, heal=heal)
        expected = mix(befores, units(), mixing)
        for network, one in enumerate(round_):
            for key, value in one.after.items():
                assert same_bits(value, expected[network][key]), (number, network, key)
                assert value.isfinite().all() or (network == 1 and not heal)
            assert one.record.diverged == {1: "a weight that is not finite in 2.weight"}
            assert one.record.healed == ({1: mixing.donors[1][0]} if heal else {})
            assert list(one.record.coefficient.values()) == mixing.own_share(network)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_bytes_received(networks, case):
    rule = RULES[case.rule]
    tensors = graft_tensors(build(case.model, 0))
    size = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    for number, round_ in enumerate(rounds_of(networks, case)):
        befores = [one.before for one in round_]
        mixing = rule.decide(
            torch.stack([rule.measure(units(), before) for before in befores]), number
        )
        for network, one in enumerate(round_):
            if isinstance(mixing, ScalarSwap):
                chosen = sum(
                    len(mixing.chosen_scalars(index, key, tensors[key].numel())[0])
                    * tensors[key].element_size()
                    for index, unit in enumerate(units())
                    for key in unit.tensors
                    if key not in unit.buffers
                )
                assert one.record.bytes_received == (networks - 1) * chosen
                assert chosen < (0.3 if case.rule == "wash" else 0.05) * sum(size.values())
                assert one.record.distance == {}
            else:
                p2p = case.exchange == "p2p"
                senders = len(mixing.donors[network]) if p2p else networks - 1
                assert one.record.bytes_received == senders * sum(size.values())
                assert len(one.record.distance) == len(units())


def play_deterministically(context: RankContext, cases: tuple[Case, ...]) -> dict[str, list[Round]]:
    torch.use_deterministic_algorithms(True)
    return play(context, cases)


def test_rounds_with_deterministic_algorithms():
    """--runtime.deterministic: operations without a deterministic implementation raise."""
    cases = tuple(Case(rule, "p2p") for rule in RULES)
    usual = population(2)
    for network, played in enumerate(run(play_deterministically, 2, cases)):
        for case in cases:
            for one, other in zip(played[str(case)], usual[network][str(case)], strict=True):
                assert all(same_bits(one.after[key], other.after[key]) for key in one.after)


@pytest.mark.parametrize("networks", [2, 3, 4])
def test_wash_preserves_the_values_at_every_position(networks):
    for model in MODELS:
        for round_ in rounds_of(networks, Case("wash", "p2p", model)):
            for key, value in round_[0].before.items():
                if value.is_floating_point():
                    before, after = (
                        torch.stack([state[key].double() for state in states]).sort(dim=0).values
                        for states in ([o.before for o in round_], [o.after for o in round_])
                    )
                    assert torch.equal(before, after), key


@pytest.mark.parametrize("networks", [2, 3, 4])
def test_wash_does_not_change_running_statistics(networks):
    statistics = [key for unit in units() for key in unit.buffers]
    assert len(statistics) == 10
    for model in MODELS:
        for round_ in rounds_of(networks, Case("wash", "p2p", model)):
            for one in round_:
                assert all(same_bits(one.after[key], one.before[key]) for key in statistics)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("rule", ["average", "papa-all"])
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_all_networks_become_the_mean(networks, rule, exchange):
    for round_ in rounds_of(networks, Case(rule, exchange)):
        for key, value in round_[0].before.items():
            if value.is_floating_point():
                mean = torch.stack([one.before[key].double() for one in round_]).mean(dim=0)
                for one in round_:
                    torch.testing.assert_close(one.after[key].double(), mean, rtol=1e-5, atol=1e-6)


def rates(context: RankContext) -> tuple[object, bool]:
    """Run a round with another rate on the last rank; returns whether weights are unchanged."""
    model = build("ragged", context.rank)
    before = snapshot(model)
    grafter = grafter_of(model, Case("papa", "all_gather"))
    rate = 0.25 if context.rank == context.networks - 1 else 0.5
    outcome = result_or_error(lambda: grafter.graft(rate=rate))
    after = snapshot(model)
    return outcome, all(same_bits(before[key], after[key]) for key in before)


@pytest.mark.parametrize("networks", [2, 3])
def test_different_rates_are_an_error_on_every_rank(networks):
    for (kind, text), unchanged in run(rates, networks):
        assert kind == "DisagreementError"
        assert "rank 0 " in text
        assert f"rank {networks - 1} " in text
        assert "rate" in text
        assert unchanged


def seeds(context: RankContext) -> object:
    """Run a round with a different seed on every rank."""
    grafter = Grafter(build("ragged", context.rank), rule=Wash(seed=context.rank))
    return result_or_error(grafter.graft)


def test_different_seeds_are_an_error():
    for kind, text in run(seeds, 2):
        assert kind == "DisagreementError"
        assert "seed is 0 in network 0 and 1 in network 1" in text
