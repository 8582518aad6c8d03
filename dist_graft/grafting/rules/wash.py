"""WASH: train an ensemble with communication-efficient weight shuffling (arXiv 2405.17517)."""

# Annotations are evaluated: to resolve postponed ones of a class with options, jsonargparse would
# execute the block under TYPE_CHECKING and import torch.
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_graft.grafting.rules.base import Interval, RoundSchedule, Rule, require

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True, kw_only=True)
class WashConfig(RoundSchedule):
    """WASH (arXiv 2405.17517), for method wash."""

    probability: float = 0.001
    """Probability p that a scalar of the first layer is shuffled in a round; it decreases linearly
    to 0 at the last layer."""
    every_steps: int = 1
    """Optimizer steps between two rounds."""

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "probability", self.probability, "in [0, 1]")
        require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")

    @property
    def interval(self) -> Interval:
        """Every few steps."""
        return Interval(steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class Wash(WashConfig, Rule):
    """WASH (arXiv 2405.17517): a few scalars are shuffled among the networks.

    A scalar of unit l of L is chosen with probability p (1 - l / (L - 1)); the networks' values at
    that position are permuted at random, by default after every step. All ranks draw from the same
    seed, so only the chosen scalars are exchanged. Running statistics are not exchanged, because
    they describe the activations of their network (ADR 24). The delivered model is the
    population's soup.
    """

    options = WashConfig
    delivers = "soup"
    synchronous = True

    seed: int = 0

    def decide(self, information: "Tensor", round_: int) -> "Mixing":
        """Choose the scalars of this round."""
        import torch

        from dist_graft.grafting.mixing import ScalarSwap, mixing_with_mean

        networks, units = information.shape
        last = max(1, units - 1)
        probability = tuple(self.probability * (1 - unit / last) for unit in range(units))
        mean = mixing_with_mean(networks, units)
        identity = torch.eye(networks, dtype=torch.float64)
        chosen = torch.tensor(probability, dtype=torch.float64)[:, None, None]
        return ScalarSwap(
            shares=identity * (1 - chosen) + mean.shares * chosen,
            donors=mean.donors,
            probability=probability,
            seed=self.seed,
            round=round_,
        )
