"""DiLoCo between processes against one process: `mix`, then the rule's step after the exchange."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from architectures import build, disturb_, places, same_bits, snapshot
from harness import RankContext, result_or_error, run
from rounds import Round
from torch import Tensor, nn

from dist_graft import Diloco, Grafter, graft_units, mix
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.multi_tensor import forced_multi_tensor
from dist_graft.grafting.units import graft_tensors

ROUNDS = 3
RULE = Diloco(outer_lr=0.6, outer_momentum=0.8)


@dataclass(frozen=True)
class Case:
    architecture: str
    exchange: str
    bucket_bytes: int = 252
    lost: bool = False
    """Whether the last network diverges before every round, and is healed."""
    resumed: bool = False
    """Whether a new Grafter takes over after every round."""
    multi_tensor: bool = False


CASES = (
    Case("plain", "all_gather"),
    Case("plain", "p2p", resumed=True),
    Case("mixed_types", "p2p"),
    Case("channels_last", "all_gather", 1 << 20, multi_tensor=True),
    Case("grouped", "p2p", lost=True),
    Case("tied", "all_gather", lost=True, multi_tensor=True),
)
Played = tuple[list[Round], dict[str, Tensor]]


def grafter_of(model: nn.Module, case: Case, **groups: dist.ProcessGroup) -> Grafter:
    return Grafter(
        model,
        rule=RULE,
        **groups,
        exchange=case.exchange,  # type: ignore[arg-type]
        bucket_mb=case.bucket_bytes / 2**20,
        on_divergence="heal" if case.lost else "raise",
    )


def train(model: nn.Module, case: Case, network: int, networks: int, number: int) -> None:
    """Change the model as training would, or lose it."""
    disturb_(model, networks * number + network)
    if case.lost and network == networks - 1:
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)


def play(context: RankContext, replicas: int) -> dict[Case, Played]:
    """All networks start with the same weights; returns rounds and final state."""
    played = {}
    network, networks = context.rank // replicas, context.networks // replicas
    groups = {}
    if replicas > 1:
        ranks = torch.arange(context.networks).view(networks, replicas)
        groups["group"], _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
        groups["replica_group"], _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    for case in CASES:
        model = build(case.architecture, 0)
        grafter = grafter_of(model, case, **groups)
        rounds = []
        for number in range(ROUNDS):
            if case.resumed:
                saved = {key: value.clone() for key, value in grafter.rule_state.items()}
                grafter = grafter_of(build(case.architecture, 1 + context.rank), case, **groups)
                grafter.load_rule_state(saved)
                grafter._module, grafter.round = model, number
            train(model, case, network, networks, number)
            before, there = snapshot(model), places(model)
            with forced_multi_tensor() if case.multi_tensor else nullcontext():
                record = grafter.graft()
            rounds.append(Round(before, snapshot(model), record, places(model) != there))
        played[case] = rounds, grafter.rule_state
    return played


@cache
def population(networks: int, replicas: int) -> list[dict[Case, Played]]:
    return run(play, networks * replicas, replicas)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("networks", "replicas"), [(2, 1), (3, 1), (2, 2)])
def test_rounds_equal_one_process_bit_for_bit(networks: int, replicas: int, case: Case) -> None:
    start = build(case.architecture, 0)
    units = graft_units(start)
    state = RULE.init_state(units, graft_tensors(start))
    by_rank = [one[case] for one in population(networks, replicas)]
    for number, round_ in enumerate(zip(*(rounds for rounds, _ in by_rank), strict=True)):
        befores = [one.before for one in round_[::replicas]]
        mixing = RULE.decide(torch.zeros(networks, len(units)), number)
        if case.lost:
            mixing = without_diverged(mixing, {networks - 1}, heal=True)
        mixed = mix(befores, units, mixing)
        RULE.after_exchange(units, mixed[0], state)
        floating = [key for unit in units for key in unit.tensors]
        for one in round_:
            assert not one.moved
            assert all(same_bits(one.after[key], mixed[0][key]) for key in floating)
            assert all(one.after[key].isfinite().all() for key in floating)
            integers = set(one.after) - {
                key for key in one.after if mixed[0][key].is_floating_point()
            }
            assert all(same_bits(one.after[key], one.before[key]) for key in integers)
            assert not all(same_bits(one.after[key], one.before[key]) for key in floating)
    for _, kept in by_rank:
        assert set(kept) == set(state)
        assert all(same_bits(kept[key], state[key]) for key in state)


def start(context: RankContext) -> list[object]:
    model = build("plain", context.rank)
    return [
        result_or_error(Grafter(model, rule=RULE).check),
        result_or_error(lambda: Grafter(model, rule=RULE, on_divergence="exclude")),
    ]


def test_what_all_networks_must_share_is_checked_on_every_rank() -> None:
    for (kind, text), excluded in run(start, 2):
        assert kind == "DisagreementError"
        assert "digest of the weights at the start (model.shared_init) is" in text
        assert excluded[0] == "ValueError"
        assert "none can be excluded: on_divergence must be 'raise' or 'heal'" in excluded[1]


class Reducing(Grafter):
    """Grafter that all-reduces means over gloo, too."""

    def _reduces_means(self, device: torch.device) -> bool:
        del device
        return True


def reduce(context: RankContext) -> list[dict[str, Tensor]]:
    model = build("channels_last", 0)
    grafter, afters = Reducing(model, rule=RULE), []
    for number in range(ROUNDS):
        disturb_(model, context.networks * number + context.rank)
        assert grafter.graft().bytes_received > 0
        afters.append({key: value.clone() for key, value in graft_tensors(model).items()})
    return [*afters, grafter.rule_state]


def test_reduced_means_give_all_networks_the_same_bits() -> None:
    """As over NCCL, where the sum has another order than in one process."""
    first, *others = run(reduce, 3)
    wanted = population_of_reduced_means()
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(same_bits(one[key], two[key]) for key in one)
    for after, expected in zip(first, wanted, strict=False):
        for key, value in after.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def population_of_reduced_means() -> list[dict[str, Tensor]]:
    models = [build("channels_last", 0) for _ in range(3)]
    units = graft_units(models[0])
    state, afters = RULE.init_state(units, graft_tensors(models[0])), []
    for number in range(ROUNDS):
        for network, model in enumerate(models):
            disturb_(model, 3 * number + network)
        tensors = [graft_tensors(model) for model in models]
        (after, *_) = mix(tensors, units, RULE.decide(torch.zeros(3, len(units)), number))
        RULE.after_exchange(units, after, state)
        with torch.no_grad():
            for own in tensors:
                for key, value in own.items():
                    value.copy_(after[key])
        afters.append(after)
    return afters
