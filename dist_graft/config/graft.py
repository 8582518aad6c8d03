"""Options of grafting and of the exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import above_zero, at_least, known_or_own, require
from dist_graft.errors import ConfigError

_CRITERIA = ("entropy", "filter_entropy", "l1", "constant", "shuffled")
_TOPOLOGIES = ("ring", "random", "exponential")


@dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """Grafting rounds and the exchange between networks."""

    every: int = 1
    """Epochs between rounds; 0: no rounds, the networks train independently. papa, wash and diloco
    have an interval of their own instead."""
    every_steps: int = 0
    """Optimizer steps between rounds; overrides every. 0: use every."""
    start: int = 0
    """Epochs to train before the first round, with any method."""
    stop: int = 0
    """No rounds after this many epochs, with any method; 0: no limit."""
    qsr_alpha: float | None = None
    """alpha of the Quadratic Synchronization Rule (arXiv 2310.14423): the next round follows after
    max(every_steps, floor((alpha / lr)^2)) steps, so intervals grow as the learning rate falls; lr
    is the largest learning rate among the networks. One more round follows the last step. Unset: a
    round every every_steps steps."""
    source: Literal["external", "internal", "noise"] = "external"
    """What is grafted: another network's weights (external), this network's strongest filters
    (internal), or noise. internal and noise need no exchange and work with a single network."""
    rule: str | None = None
    """package.module:name of a user-defined rule that replaces grafting."""
    topology: str = "ring"
    """Donor of each network: ring (the previous network), random (a new draw every round),
    exponential (the network at distance 1, 2, 4, ... in turn), or package.module:name of a function
    (networks, round, seed) -> donor of each network."""
    level: Literal["layer", "filter"] = "layer"
    """layer: one coefficient per layer, from the criterion; filter: one per channel, from the batch
    norm scales (plain convolutional chains such as VGG only)."""
    filter_rule: Literal["channel", "authors"] = "channel"
    """With level filter: how channel shares apply to a weight. channel: it keeps the mean of the
    shares of its two channels; authors: as in the published script, it keeps their product, and
    batch norm keeps the product of all shares of its layer."""
    criterion: str = "entropy"
    """Information of a layer: entropy of its weights (eq. 6, in nats), filter_entropy (sum of its
    filters' entropies, eq. 5, in nats), l1 (mean absolute weight), or package.module:name of a
    function (filters, num_bins) -> number. Two are controls: constant keeps one half of every
    layer, shuffled permutes the coefficients over the layers."""
    num_bins: int = 10
    """Histogram bins for the entropy, in [1, 4096]."""
    amplitude: float = 0.4
    """A in eq. 7, in [0, 1]: coefficients are in [1/2 - A/2, 1/2 + A/2]."""
    sensitivity: float = 5.0
    """c in eq. 7, per unit of information: slope of the coefficient."""
    lead: Literal["conv", "conv+linear"] = "conv"
    """Layers that form graft units; use conv+linear for MLPs and transformers."""
    exchange: Literal["all_gather", "p2p", "files"] = "all_gather"
    """all_gather: every network receives all networks' weights; p2p: only its donor's; files: every
    network is an independent job, and they exchange weights through run_dir only (section
    population)."""
    max_lag: float = 2
    """files: maximum distance to a donor in epochs, ahead or behind; 0: only donors at the same
    step."""
    wait_seconds: float | Literal["inf"] = 0
    """files: how long a round waits for its donor (with max_lag 0: for all networks); inf: without
    limit."""
    internal: Literal["replace", "add"] = "replace"
    """With source internal: a strong filter replaces an invalid one (replace), or is added to it
    (add), as in the authors' first release."""
    threshold: float = 0.1
    """Filters with an L1 norm below this are invalid and get replaced (internal and noise)."""
    noise_annealing: float = 0.975
    """a in (0, 1]: the noise has standard deviation a^round."""
    bucket_mb: float = 32.0
    """Maximum size of an exchange buffer per network, in MiB; at most 16 are used on the CPU."""
    reset_momentum: bool = False
    """Clear the optimizer state (momentum, AdamW's moments) after each round."""
    ema: bool = True
    """With optim.ema_decay: the moving averages exchange weights in each round, too, with the same
    coefficients. Doubles the bytes of a round."""

    def __post_init__(self) -> None:
        at_least("graft.every", self.every, 0)
        at_least("graft.every_steps", self.every_steps, 0)
        at_least("graft.start", self.start, 0)
        at_least("graft.stop", self.stop, 0)
        if 0 < self.stop <= self.start:
            raise ConfigError(
                f"graft.stop must be above graft.start, got {self.stop} and {self.start}"
            )
        above_zero("graft.qsr_alpha", self.qsr_alpha)
        if self.qsr_alpha is not None and not self.every_steps:
            raise ConfigError(
                "graft.qsr_alpha requires graft.every_steps, the smallest number of steps between "
                "rounds"
            )
        if self.filter_rule != "channel" and self.level != "filter":
            raise ConfigError("graft.filter_rule requires graft.level filter")
        if self.internal != "replace" and self.source != "internal":
            raise ConfigError("graft.internal requires graft.source internal")
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
        at_least("graft.max_lag", self.max_lag, 0)
        wait = float(self.wait_seconds)
        require(wait >= 0, "graft.wait_seconds", self.wait_seconds, "at least 0, or inf")
        if self.exchange != "files" and (self.max_lag, wait) != (2, 0):
            raise ConfigError("graft.max_lag and graft.wait_seconds require graft.exchange files")


def refuse_intervals(graft: GraftConfig, name: str) -> None:
    """Raise ConfigError if there are options for the interval of a method that has its own."""
    own = f"{name} has its own interval between rounds"
    given = {"qsr_alpha": graft.qsr_alpha is not None, "every_steps": graft.every_steps > 0}
    if others := [f"graft.{option}" for option, is_given in given.items() if is_given]:
        raise ConfigError(f"{own}: leave out {' and '.join(others)}")
    if graft.every == 0:
        raise ConfigError(
            f"{own}, which graft.every 0 does not change: choose method none to train without "
            "exchange"
        )
