"""PAPA: population parameter averaging (arXiv 2304.03094)."""

# Annotations are evaluated: to resolve postponed ones of a class with options, jsonargparse would
# execute the block under TYPE_CHECKING and import torch.
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dist_graft.grafting.rules.base import Interval, RoundSchedule, Rule, require

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True, kw_only=True)
class PapaConfig(RoundSchedule):
    """PAPA (arXiv 2304.03094), for method papa."""

    every_steps: int = 10
    """Optimizer steps between two pulls toward the mean."""
    beta: float = 0.99
    """Share that a network keeps in a pull, in [0, 1]; 1 - beta decays with the learning rate."""
    variant: Literal["pull", "all", "pairs"] = "pull"
    """pull: toward the mean. all: every few epochs each network becomes the mean of all networks;
    pairs: of two random ones."""
    every: int = 5
    """Epochs between two rounds of the variants all and pairs."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")
        require(0 <= self.beta <= 1, "beta", self.beta, "in [0, 1]")
        require(self.every >= 1, "every", self.every, "at least 1")
        variants = ("pull", "all", "pairs")
        require(self.variant in variants, "variant", self.variant, "pull, all or pairs")

    @property
    def interval(self) -> Interval:
        """Every few steps for pulls, every few epochs for the other variants."""
        if self.variant == "pull":
            return Interval(steps=self.every_steps)
        return Interval(epochs=self.every)

    def rate(self, lr_factor: float) -> float:
        """Scale the pull with the learning rate; the other variants are constant."""
        return lr_factor if self.variant == "pull" else 1.0


@dataclass(frozen=True, kw_only=True)
class Papa(PapaConfig, Rule):
    """PAPA (arXiv 2304.03094): every network is pulled toward the population mean.

    theta_k <- beta theta_k + (1 - beta) mean(theta), with 1 - beta multiplied by lr / lr_0, every
    10 steps by default. The variants without a pull replace the weights: "all" by the population
    mean, "pairs" by the mean of two random networks (distinct pairs for distinct networks if
    possible). The delivered model is the population's soup.
    """

    options = PapaConfig
    delivers = "soup"

    seed: int = 0
    """Seed of the random pairs."""

    def decide(self, information: "Tensor", round_: int) -> "Mixing":
        """Pull toward the mean, or replace the weights by a mean."""
        import torch

        from dist_graft.grafting.mixing import Mixing, mixing_with_mean

        networks, units = information.shape
        if self.variant == "pull":
            return mixing_with_mean(networks, units, keep=self.beta)
        if self.variant == "all" or networks < 2:
            return mixing_with_mean(networks, units)
        draw = random.Random(f"{self.seed}:{round_}")
        pairs = list(itertools.combinations(range(networks), 2))
        drawn = draw.sample(pairs, networks) if networks > 2 else pairs * networks
        shares = torch.zeros(units, networks, networks, dtype=torch.float64)
        donors = []
        for network, pair in enumerate(drawn):
            shares[:, network, list(pair)] = 0.5
            donors.append(tuple(sorted(set(pair) - {network})))
        return Mixing(shares=shares, donors=tuple(donors))
