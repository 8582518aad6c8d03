"""PAPA (arXiv 2304.03094): every network is pulled toward the population mean."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.average import Average, pull_to_mean


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
