"""WASH (arXiv 2405.17517): a few scalars are permuted among the networks."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.average import Average, pull_to_mean


@dataclass(frozen=True, eq=False)
class Shuffle(Mixing):
    """Chosen scalars of parameters are permuted among the networks; all others stay.

    The shares are expectations; which scalar goes where follows from seed, round and key.
    """

    probability: tuple[float, ...] = ()
    """That a scalar of a unit is chosen, per unit."""
    seed: int = 0
    round: int = 0

    def scaled(self, rate: float) -> Shuffle:
        """As many times fewer scalars are chosen."""
        slower = tuple(rate * probability for probability in self.probability)
        return replace(self, shares=super().scaled(rate).shares, probability=slower)

    def row_without(self, network: int, lost: Collection[int]) -> Tensor:
        """The network keeps the scalars that it would have got from the lost ones."""
        row = self.shares[:, network].clone()
        row[:, network] += row[:, list(lost)].sum(dim=1)
        row[:, list(lost)] = 0.0
        return row

    def chosen(self, unit: int, key: str, numel: int) -> tuple[Tensor, Tensor]:
        """The scalars of one tensor that move, the same in every process.

        Returns: positions, int64 [n], in the tensor's logical order; sources, int64 [n, networks]:
        whose scalar each network holds afterwards, a permutation in each row.
        """
        draw = torch.Generator().manual_seed(_key_seed(self.seed, self.round, key))
        positions = bernoulli_positions(numel, self.probability[unit], draw)
        order = torch.rand(len(positions), self.networks, generator=draw).argsort(dim=1)
        return positions, order

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor:
        """1 where the network's new scalar is the donor's, else 0; buffers stay."""
        fraction = torch.zeros(math.prod(shape))
        if buffer:
            return fraction.view(shape)
        positions, sources = self.chosen(unit, key, math.prod(shape))
        fraction[positions[sources[:, network] == donor]] = 1.0
        return fraction.view(shape)


@dataclass(frozen=True, kw_only=True)
class Wash(Average):
    """WASH (arXiv 2405.17517): a few scalars change places among the networks.

    A scalar of unit l of L is chosen with probability p (1 - l / (L - 1)), and permuted at random;
    a shared seed makes all processes choose alike, so that only the chosen ones travel. Running
    statistics stay with their network, whose own activations they are of (ADR 24).
    """

    probability: float = 0.001
    """p, of the first unit."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability!r}")

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Which scalars move in this round."""
        networks, units = information.shape
        last = max(1, units - 1)
        probability = tuple(self.probability * (1 - unit / last) for unit in range(units))
        if units == 1:
            probability = (self.probability,)
        even = pull_to_mean(networks, units, keep=0.0)
        own = torch.eye(networks, dtype=torch.float64)
        share = torch.tensor(probability, dtype=torch.float64)[:, None, None]
        return Shuffle(
            shares=own * (1 - share) + even.shares * share,
            donors=even.donors,
            probability=probability,
            seed=self.seed,
            round=round_,
        )


def bernoulli_positions(count: int, probability: float, draw: torch.Generator) -> Tensor:
    """Positions of the successes in `count` independent trials, int64, in order.

    Draws the gaps between successes (geometric), so the cost grows with the successes only.
    """
    if probability <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if probability >= 1:
        return torch.arange(count)
    found: list[Tensor] = []
    last = -1
    while last < count:
        expected = (count - last) * probability
        batch = int(expected + 5 * math.sqrt(expected) + 10)
        gaps = torch.empty(batch, dtype=torch.float64).geometric_(probability, generator=draw)
        positions = last + gaps.to(torch.int64).cumsum(0)
        found.append(positions)
        last = int(positions[-1])
    every = torch.cat(found)
    return every[every < count]


def _key_seed(seed: int, round_: int, key: str) -> int:
    return random.Random(f"{seed}:{round_}:{key}").getrandbits(63)
