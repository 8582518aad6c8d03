"""Other ways in which a population can share weights, as rules on the same exchange."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True, kw_only=True)
class Average:
    """Local SGD: every network becomes the mean of all."""

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Nothing to tell: [units] zeros."""
        del tensors
        return torch.zeros(len(units), dtype=torch.float64)

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """A share of 1 / K of each network, in every unit."""
        del round_
        return pull_to_mean(*information.shape, keep=0.0)


@dataclass(frozen=True, kw_only=True)
class Papa(Average):
    """PAPA (arXiv 2304.03094): theta_k <- beta theta_k + (1 - beta) mean(theta).

    The rare variants go without the pull: "all", every network becomes the mean; "pairs", each
    becomes the mean of two random ones, no two networks of the same two where there are enough.
    """

    beta: float = 0.99
    variant: Literal["pull", "all", "pairs"] = "pull"
    seed: int = 0
    """Of the random pairs."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta!r}")
        if self.variant not in ("pull", "all", "pairs"):
            raise ValueError(f"variant must be pull, all or pairs, got {self.variant!r}")

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """The pull, the mean, or the means of random pairs."""
        networks, units = information.shape
        if self.variant == "pull":
            return pull_to_mean(networks, units, keep=self.beta)
        if self.variant == "all" or networks < 2:
            return pull_to_mean(networks, units, keep=0.0)
        draw = random.Random(f"{self.seed}:{round_}")
        shares = torch.zeros(units, networks, networks, dtype=torch.float64)
        donors = []
        pairs = list(itertools.combinations(range(networks), 2))
        drawn = draw.sample(pairs, networks) if networks > 2 else pairs * networks
        for network, pair in enumerate(drawn):
            shares[:, network, list(pair)] = 0.5
            donors.append(tuple(sorted(set(pair) - {network})))
        return Mixing(shares=shares, donors=tuple(donors))


def pull_to_mean(networks: int, units: int, *, keep: float) -> Mixing:
    """Each network becomes `keep` of itself and 1 - keep of the population's mean."""
    row = (1 - keep) / networks
    own = torch.eye(networks, dtype=torch.float64)
    return Mixing(
        shares=(row * torch.ones_like(own) + keep * own).expand(units, -1, -1).clone(),
        donors=tuple(
            tuple(other for other in range(networks) if other != network)
            for network in range(networks)
        ),
    )


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
