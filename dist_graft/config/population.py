"""Options of a population whose networks are separate jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import at_least, require


@dataclass(frozen=True, kw_only=True)
class PopulationConfig:
    """The population that a job belongs to (graft.exchange files)."""

    size: int | None = None
    """Number of networks in the population; required with graft.exchange files. It may grow while
    the population trains."""
    network: int | Literal["auto"] = "auto"
    """Number of this job's network, from 0. auto: the index of the task in a Slurm array or an
    indexed Kubernetes job (SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX); otherwise the first network
    that no other job trains."""
    join: Literal["fresh", "donor"] = "fresh"
    """How a network without a checkpoint starts. fresh: from its own random weights, in epoch 1;
    donor: with the weights and the epoch of the network that has trained farthest."""

    def __post_init__(self) -> None:
        at_least("population.size", self.size, 1)
        if self.network != "auto":
            legal = "at least 0" if self.size is None else f"in 0 to {self.size - 1}, or auto"
            in_range = self.network >= 0 and (self.size is None or self.network < self.size)
            require(in_range, "population.network", self.network, legal)
