"""From what the networks know of themselves to what flows where: one class a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_graft.grafting.coefficient import graft_coefficient
from dist_graft.grafting.criteria import CRITERIA
from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.topology import ring


class Rule(Protocol):
    """What a population method has to say; every process must build it alike.

    A dataclass: its fields are compared between the processes before anything is exchanged.
    """

    def information(self, filters: Tensor) -> Tensor:
        """Information of one lead's weight, [filters, weights per filter] -> scalar."""

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """What flows where.

        Args:
            information: [networks, units], float64 on the CPU, the same in every process.
            round_: number of the round, from 0.

        Returns: a Mixing that is a pure function of the arguments.
        """


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Filter grafting: each network takes from its ring neighbour, layer by layer (eq. 7)."""

    amplitude: float = 0.4
    sensitivity: float = 5.0
    num_bins: int = 10
    criterion: str = "entropy"

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}"
            )
        if self.num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {self.num_bins!r}")
        graft_coefficient(0.0, 0.0, amplitude=self.amplitude, sensitivity=self.sensitivity)

    def information(self, filters: Tensor) -> Tensor:
        """Information of one lead by the criterion; [filters, weights per filter] -> scalar."""
        return CRITERIA[self.criterion](filters, self.num_bins)

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Share alpha of itself and 1 - alpha of network (k - 1) mod K, in every round."""
        networks, units = information.shape
        donor = ring(networks)
        own = graft_coefficient(
            information,
            information[donor],
            amplitude=self.amplitude,
            sensitivity=self.sensitivity,
        )
        rows = torch.arange(networks)
        shares = torch.zeros(units, networks, networks, dtype=torch.float64)
        shares[:, rows, donor] = (1 - own).T
        shares[:, rows, rows] = own.T if networks > 1 else 1.0
        donors = tuple((other,) if networks > 1 else () for other in donor)
        return Mixing(shares=shares, donors=donors)
