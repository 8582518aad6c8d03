"""Functions that run on the ranks of the tests of rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from architectures import State, build, disturb_, lead_of, places, snapshot
from harness import RankContext
from torch import Tensor

from dist_graft import Grafter, GraftRecord, Mixing
from dist_graft.grafting.information import entropy
from dist_graft.grafting.multi_tensor import forced_multi_tensor
from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True)
class Case:
    """One architecture and how its rounds are run."""

    architecture: str
    exchange: str
    bucket_bytes: int
    rule: Rule | None = None
    rounds: int = 2
    multi_tensor: bool = False
    """Whether the rounds take the accelerators' branch."""

    def __str__(self) -> str:
        rule = f"-{type(self.rule).__name__}" if self.rule else ""
        branch = "-multi" if self.multi_tensor else ""
        return f"{self.architecture}-{self.exchange}-{self.bucket_bytes}{rule}{branch}"


@dataclass(frozen=True)
class Round:
    """One network before and after one round."""

    before: State
    after: State
    record: GraftRecord
    moved: bool = False
    """Whether a tensor was reallocated by the round."""


class MeasuresEntropy:
    """Rule that measures the entropy of each lead."""

    reports_information = True

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([entropy(tensors[unit.lead].detach()) for unit in units])


@dataclass(frozen=True)
class Mean(MeasuresEntropy):
    """Every network becomes a weighted mean of all, with weights that change every round."""

    def decide(self, information: Tensor, round_: int) -> Mixing:
        networks, units = information.shape
        weights = torch.arange(1.0, networks + 1, dtype=torch.float64) + round_
        rows = torch.stack([weights.roll(network) for network in range(networks)])
        shares = (rows / rows.sum(dim=1, keepdim=True)).expand(units, networks, networks)
        donors = tuple(
            tuple(other for other in range(networks) if other != network)
            for network in range(networks)
        )
        return Mixing(shares=shares.clone(), donors=donors)


@dataclass(frozen=True)
class OneGives(MeasuresEntropy):
    """All networks take a third of network 0, which takes nothing."""

    def decide(self, information: Tensor, round_: int) -> Mixing:
        networks, units = information.shape
        shares = torch.eye(networks, dtype=torch.float64).repeat(units, 1, 1)
        shares[:, 1:] *= 2 / 3
        shares[:, 1:, 0] = 1 / 3
        return Mixing(shares=shares, donors=((), *[(0,)] * (networks - 1)))


Rule = Mean | OneGives


def play(context: RankContext, cases: list[Case]) -> dict[str, list[Round]]:
    """Run a few rounds of every case, with a perturbation after each round."""
    return {str(case): _rounds(context, case) for case in cases}


def _rounds(context: RankContext, case: Case) -> list[Round]:
    model = build(case.architecture, context.rank)
    grafter = Grafter(
        model,
        lead=lead_of(case.architecture),
        exchange=case.exchange,
        bucket_mb=case.bucket_bytes / 2**20,
        rule=case.rule,
    )
    rounds = []
    for number in range(case.rounds):
        before, there = snapshot(model), places(model)
        with forced_multi_tensor() if case.multi_tensor else nullcontext():
            record = grafter.graft()
        rounds.append(Round(before, snapshot(model), record, places(model) != there))
        disturb_(model, context.networks * (number + 1) + context.rank)
    return rounds
