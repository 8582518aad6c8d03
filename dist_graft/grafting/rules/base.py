"""The interface of a population method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.units import GraftUnit


class Rule(Protocol):
    """What a population method has to say; every process must build it alike.

    A dataclass: its fields are compared between the processes before anything is exchanged.
    """

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """What this network tells the others before a round: [n], the same n in all of them.

        Args:
            units: the graft units.
            tensors: the network's own tensors by state-dict key; not to be changed.
        """

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """What flows where.

        Args:
            information: [networks, n], what each network measured, float64 on the CPU, the same in
                every process.
            round_: number of the round, from 0.

        Returns: a Mixing that is a pure function of the rule and the arguments.
        """


def take_from(donor: Sequence[int], own: Tensor) -> Mixing:
    """Each network keeps a share of itself and takes the rest from one donor.

    Args:
        donor: of each network; itself in a population of one.
        own: [networks, units], float64, each in [0, 1].
    """
    networks, units = own.shape
    rows = torch.arange(networks)
    shares = torch.zeros(units, networks, networks, dtype=torch.float64)
    shares[:, rows, list(donor)] = (1 - own).T
    shares[:, rows, rows] = own.T if networks > 1 else 1.0
    return Mixing(shares=shares, donors=tuple((other,) if networks > 1 else () for other in donor))
