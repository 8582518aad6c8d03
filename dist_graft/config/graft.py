"""Options of grafting and of the exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import above_zero, at_least, known_or_own, require

_CRITERIA = ("entropy", "filter_entropy", "l1", "constant", "shuffled")
_TOPOLOGIES = ("ring", "random", "exponential")


@dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """How the networks graft each other."""

    every: int = 1
    """Epochs between two rounds; 0: never, the networks are independent."""
    every_steps: int = 0
    """Optimizer steps between two rounds, instead of epochs; 0: count epochs."""
    start: int = 0
    """Epochs that are trained before rounds begin."""
    source: Literal["external", "internal", "noise"] = "external"
    """Where scions come from: another network, this network's own strongest filters, or noise.
    The last two exchange nothing and work with one network."""
    rule: str | None = None
    """package.module:name of a rule of your own (docs/extending.md), in place of grafting."""
    topology: str = "ring"
    """Who gives to whom: ring (the neighbour), random (a new network in each round), exponential
    (the one at distance 1, 2, 4, ... in turn), or package.module:name of a function (networks,
    round, seed) -> the donor of each network."""
    level: Literal["layer", "filter"] = "layer"
    """layer: one coefficient a layer, by the criterion; filter: one a channel, by the scales of the
    batch norm (plain convolutional chains such as VGG)."""
    criterion: str = "entropy"
    """What a layer's information is: entropy of all its weights (eq. 6), filter_entropy, the sum of
    its filters' entropies (eq. 5), both in nats, or l1, the mean absolute weight. Two test whether
    it matters: constant keeps one half, shuffled permutes the coefficients over the layers. Or
    package.module:name of a function (filters, num_bins) -> number."""
    num_bins: int = 10
    """Bins of the histogram that the entropy is computed from."""
    amplitude: float = 0.4
    """A of eq. 7, in [0, 1]: the coefficient stays within A/2 of one half."""
    sensitivity: float = 5.0
    """c of eq. 7, per unit of information: how fast the coefficient leaves one half."""
    lead: Literal["conv", "conv+linear"] = "conv"
    """Which layers lead a graft unit; conv+linear for MLPs and transformers."""
    exchange: Literal["all_gather", "p2p"] = "all_gather"
    """all_gather: every process sees every network; p2p: only the donor's weights travel."""
    threshold: float = 0.1
    """L1 norm below which a filter is invalid (sources internal and noise)."""
    noise_annealing: float = 0.975
    """a of the noise's standard deviation a^round, in (0, 1]."""
    bucket_mb: float = 32.0
    """Largest size of one network's part of a buffer, in MiB; host memory takes at most 16."""
    reset_momentum: bool = False
    """Forget the optimizer's whole state (momentum, AdamW's moments) after each round."""

    def __post_init__(self) -> None:
        at_least("graft.every", self.every, 0)
        at_least("graft.every_steps", self.every_steps, 0)
        at_least("graft.start", self.start, 0)
        known_or_own("graft.criterion", self.criterion, _CRITERIA)
        known_or_own("graft.topology", self.topology, _TOPOLOGIES)
        if self.rule is not None:
            known_or_own("graft.rule", self.rule, ())
        above_zero("graft.threshold", self.threshold)
        require(
            0 < self.noise_annealing <= 1,
            "graft.noise_annealing",
            self.noise_annealing,
            "in (0, 1]",
        )
        require(1 <= self.num_bins <= 4096, "graft.num_bins", self.num_bins, "in [1, 4096]")
        require(0 <= self.amplitude <= 1, "graft.amplitude", self.amplitude, "in [0, 1]")
        at_least("graft.sensitivity", self.sensitivity, 0)
        above_zero("graft.bucket_mb", self.bucket_mb)
