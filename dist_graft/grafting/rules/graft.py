"""From what the networks know of themselves to what flows where: one class a method."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.grafting.coefficient import graft_coefficient
from dist_graft.grafting.information import CRITERIA
from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.base import take_from
from dist_graft.grafting.topology import TOPOLOGIES, donors_of
from dist_graft.grafting.units import GraftUnit
from dist_graft.references import check_name, is_reference, resolve

CONTROLS = ("constant", "shuffled")
"""Criteria that test whether information matters; they measure entropy."""


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Filter grafting: each network takes from one other, layer by layer (eq. 7)."""

    amplitude: float = 0.4
    sensitivity: float = 5.0
    num_bins: int = 10
    criterion: str = "entropy"
    """entropy, filter_entropy or l1; or, to test the claim that information matters: constant
    (alpha = 1/2) or shuffled (each round's coefficients by entropy, permuted over the units). Or
    package.module:name of a function (filters [filters, weights], num_bins) -> a number."""
    topology: str = "ring"
    """ring, random or exponential. Or package.module:name of a function (networks, round, seed) ->
    the donor of each network; it must be pure."""
    seed: int = 0
    """Of the random topology and the shuffled coefficients."""

    def __post_init__(self) -> None:
        for field, known in (
            ("criterion", (*CRITERIA, *CONTROLS)),
            ("topology", tuple(TOPOLOGIES)),
        ):
            name = getattr(self, field)
            try:
                check_name(name, known)
                if is_reference(name):
                    resolve(name)
            except ValueError as error:
                raise ValueError(f"{field} {error}") from error
        if self.num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {self.num_bins!r}")
        graft_coefficient(0.0, 0.0, amplitude=self.amplitude, sensitivity=self.sensitivity)

    def information(self, filters: Tensor) -> Tensor:
        """Information of one lead by the criterion; [filters, weights per filter] -> scalar.

        For constant and shuffled it is the entropy.
        """
        if is_reference(self.criterion):
            return torch.as_tensor(resolve(self.criterion)(filters, self.num_bins))
        return CRITERIA[self.measured](filters, self.num_bins)

    @property
    def measured(self) -> str:
        """Name of what `information` gives."""
        return "entropy" if self.criterion in CONTROLS else self.criterion.rpartition(":")[2]

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Information of each unit's lead: [units], float64."""
        return torch.stack(
            [self.information(unit.filters(tensors[unit.lead].detach())) for unit in units]
        ).double()

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Share alpha of itself and 1 - alpha of its donor in this round's topology."""
        networks, units = information.shape
        donor = donors_of(self.topology, networks, round_, self.seed)
        own = graft_coefficient(
            information, information[donor], amplitude=self.amplitude, sensitivity=self.sensitivity
        )
        if self.criterion == "constant":
            own = torch.full_like(own, 0.5)
        elif self.criterion == "shuffled":
            seed = random.Random(f"{self.seed}:{round_}").getrandbits(32)
            draw = torch.Generator().manual_seed(seed)
            own = own[:, torch.randperm(units, generator=draw)]
        return take_from(donor, own)
