"""A round between networks of several replicas equals `mix` in one process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from architectures import State, build, lead_of, same_bits, snapshot
from harness import RankContext, result_or_error, run
from rounds import Mean, Round
from torch import nn

from dist_graft import Graft, Grafter, Wash, graft_units, mix
from dist_graft.grafting.multi_tensor import forced_multi_tensor
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.filter_graft import FilterGraft, filter_links
from dist_graft.grafting.units import graft_tensors
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.training.state import compiled

ROUNDS = 2
LAYOUTS = ((2, 2), (1, 3), (3, 1), (2, 3), (3, 2))
"""(networks, replicas)."""


@dataclass(frozen=True)
class Case:
    architecture: str
    exchange: str
    bucket_bytes: int
    rule: str = "graft"
    multi_tensor: bool = False

    def __str__(self) -> str:
        branch = "-multi" if self.multi_tensor else ""
        return f"{self.architecture}-{self.exchange}-{self.bucket_bytes}-{self.rule}{branch}"

    def build_rule(self) -> Rule:
        if self.rule == "filter":
            model = build(self.architecture, 0)
            return FilterGraft(links=filter_links(graft_units(model), graft_tensors(model)))
        return {"graft": Graft(), "mean": Mean(), "wash": Wash(probability=0.3, seed=4)}[self.rule]


RAGGED = 252  # bytes: splits every tensor and every share of one at an odd offset
CASES = (
    *(
        Case(name, exchange, RAGGED)
        for name in ("plain", "channels_last", "mixed_types", "tied", "grouped")
        for exchange in ("all_gather", "p2p")
    ),
    Case("mixed_types", "all_gather", 1 << 25),
    Case("mixed_types", "p2p", 1 << 25),
    Case("tied", "p2p", 1),
    Case("mixed_types", "all_gather", RAGGED, "mean"),
    Case("mixed_types", "p2p", RAGGED, "mean"),
    Case("mixed_types", "all_gather", RAGGED, "wash"),
    Case("plain", "p2p", RAGGED, "filter"),
    Case("mixed_types", "all_gather", RAGGED, "graft", multi_tensor=True),
    Case("mixed_types", "p2p", RAGGED, "wash", multi_tensor=True),
)


def groups(networks: int, replicas: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of this process: across networks, and within its network."""
    ranks = torch.arange(networks * replicas).view(networks, replicas)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return across, within


def play(context: RankContext, networks: int, replicas: int) -> dict[str, list[Round]]:
    across, within = groups(networks, replicas)
    return {str(case): rounds(context, case, replicas, across, within) for case in CASES}


def rounds(
    context: RankContext,
    case: Case,
    replicas: int,
    across: dist.ProcessGroup,
    within: dist.ProcessGroup,
) -> list[Round]:
    model = build(case.architecture, context.rank // replicas)
    grafter = Grafter(
        model,
        lead=lead_of(case.architecture),
        exchange=case.exchange,
        bucket_mb=case.bucket_bytes / 2**20,
        rule=case.build_rule(),
        group=across,
        replica_group=within,
    )
    played = []
    for number in range(ROUNDS):
        disturb_buffers(model, 100 * number + context.rank)
        before = snapshot(model)
        with forced_multi_tensor() if case.multi_tensor else nullcontext():
            record = grafter.graft()
        played.append(Round(before, snapshot(model), record))
    return played


def disturb_buffers(model: torch.nn.Module, seed: int) -> None:
    """As in data-parallel training, where each process counts its own batches."""
    draw = torch.Generator().manual_seed(seed)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=draw, dtype=torch.float64)
            buffer.add_(noise.to(buffer.dtype))


@cache
def results_by_rank(networks: int, replicas: int) -> list[dict[str, list[Round]]]:
    return run(play, networks * replicas, networks, replicas)


def averaged(processes: list[State], buffers: list[str]) -> State:
    """State of a network: the mean of its processes' buffers."""
    whole = dict(processes[0])
    for key in buffers:
        doubles = torch.stack([state[key].double() for state in processes])
        mean = doubles[0] + (doubles - doubles[0]).mean(dim=0)
        whole[key] = mean.to(whole[key].dtype)
    return whole


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("networks", "replicas"), LAYOUTS)
def test_a_round_equals_mix_bit_for_bit(networks: int, replicas: int, case: Case) -> None:
    model = build(case.architecture, 0)
    units = graft_units(model, lead=lead_of(case.architecture))
    buffers = [key for key, value in model.named_buffers() if value.is_floating_point()]
    tied_again = {"2.weight"} if case.architecture == "tied" else set()
    rule = case.build_rule()
    by_rank = [process[str(case)] for process in results_by_rank(networks, replicas)]
    for number in range(ROUNDS):
        parts = [
            [by_rank[network * replicas + replica][number] for replica in range(replicas)]
            for network in range(networks)
        ]
        befores = [averaged([one.before for one in part], buffers) for part in parts]
        information = torch.stack([rule.measure(units, state).double() for state in befores])
        expected = mix(befores, units, rule.decide(information, number))
        size = sum(value.numel() * value.element_size() for value in graft_tensors(model).values())
        for network, part in enumerate(parts):
            for one in part:
                for key in set(one.after) - tied_again:
                    assert same_bits(one.after[key], expected[network][key]), (number, key)
                assert one.record.network == network
                assert one.record.coefficient == part[0].record.coefficient
                assert one.record.distance == part[0].record.distance
            if case.rule in ("graft", "filter"):
                senders = min(1, networks - 1) if case.exchange == "p2p" else networks - 1
                assert part[0].record.bytes_received == senders * size
                donor, own = befores[(network - 1) % networks], befores[network]
                gaps = {key: donor[key].double() - own[key].double() for key in own}
                apart = [sum(gaps[k].square().sum() for k in unit.tensors) for unit in units]
                measured = list(part[0].record.distance.values())
                expect = [float(square) ** 0.5 if networks > 1 else 0.0 for square in apart]
                assert measured == pytest.approx(expect, rel=1e-5)


def differ(context: RankContext, what: str) -> object:
    across, within = groups(2, 2)
    model = build("plain", context.rank // 2)
    if what == "model" and context.rank == 3:
        model = build("channels_last", context.rank // 2)
    if what == "finite" and context.rank == 3:
        model[0].weight.data[0] = torch.nan
    grafter = Grafter(model, group=across, replica_group=within)

    def graft() -> object:
        return grafter.graft(stop=what == "stop" and context.rank == 1).round

    return result_or_error(graft)


def test_a_request_of_one_process_counts_for_its_network() -> None:
    """All processes of all networks take the same branch."""
    stopped = run(differ, 4, "stop")
    assert {kind for kind, _ in stopped} == {"RoundStoppedError"}
    assert {text for _, text in stopped} == {"network 0 stops before round 0"}
    lost = run(differ, 4, "finite")
    assert {kind for kind, _ in lost} == {"NonFiniteError"}
    assert all(text.startswith("network 1 has a weight that is not finite") for _, text in lost)


def test_different_replicas_of_a_network_are_an_error() -> None:
    *_, third, fourth = run(differ, 4, "model", group_timeout=5)
    for kind, text in (third, fourth):
        assert kind == "DisagreementError"
        assert "the replicas of network 1 differ in digest" in text


class Failing(nn.Linear):
    """Fails like a faulty model or like a device without memory."""

    def __init__(self, error: RuntimeError | None) -> None:
        super().__init__(2, 1)
        self.error = error

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(inputs)


def fail_in_a_step(context: RankContext, error: RuntimeError) -> object:
    replicas = Replicas(dist.group.WORLD)
    model = replicas.wrap(Failing(error if context.rank == 1 else None))

    def step() -> None:
        with replicas.backward(last=True):
            model(torch.ones(1, 2)).sum().backward()

    return result_or_error(step)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("2 GiB")],
    ids=["of the model", "of memory"],
)
def test_an_error_of_the_model_is_a_lost_peer_on_other_ranks(
    error: RuntimeError,
) -> None:
    (other, lost), (kind, text) = run(fail_in_a_step, 2, error)
    assert (kind, text) == (type(error).__name__, str(error))
    assert other == "PeerError"
    assert "lost another process of this network during a step" in lost


def wide_model() -> nn.Module:
    """Five MiB: more than the first bucket of gradients."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))


def train_wrapped(context: RankContext) -> list[tuple[list[int], list[float]]]:
    """Layers in each graph of a training step, and weights after two steps: plain and compiled."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    torch.compile = partial(torch.compile, backend=backend)
    found = []
    for mode in (False, True):
        model = wide_model()
        replicas = Replicas(dist.group.WORLD)
        forward = replicas.wrap(compiled(model, mode))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(context.rank)
        for _ in range(2):
            for last in (False, True):
                with replicas.backward(last=last):
                    forward(torch.randn(3, 600)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([weight.flatten()[:9] for weight in model.parameters()])
        found.append((list(graphs), weights.tolist()))
    return found


def test_compiled_gradients_are_reduced_while_others_are_computed() -> None:
    """One graph for each bucket of gradients: the last layer's travel during the backward pass of
    the others. One graph for all would end before the first bucket starts."""
    for (none, plain), (graphs, weights) in run(train_wrapped, 2):
        assert none == []
        assert graphs == [3, 1]
        assert weights == plain
