"""Filter grafting layer by layer (arXiv 2001.05868)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_graft.grafting.rules.base import Rule, require
from dist_graft.references import check_name, is_reference, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing
    from dist_graft.grafting.units import GraftUnit

CONTROLS = ("constant", "shuffled")
"""Criteria that test whether information matters; both measure entropy."""


@dataclass(frozen=True, kw_only=True)
class Graft(Rule):
    """Filter grafting (arXiv 2001.05868): each network is blended with one donor, layer by layer.

    theta_k <- alpha theta_k + (1 - alpha) theta_donor, with alpha from the information of the
    layer in both networks (eq. 7; see `graft_coefficient`). Rounds take place as set by
    graft.every, by default after every epoch.

    Raises: ValueError naming an option that is out of range or a reference that does not resolve.
    """

    amplitude: float = 0.4
    sensitivity: float = 5.0
    num_bins: int = 10
    criterion: str = "entropy"
    """entropy (eq. 6), filter_entropy (eq. 5) or l1. Two controls test whether information matters:
    constant (alpha = 1/2) and shuffled (the coefficients by entropy, permuted over the units in
    every round). Or package.module:name of a function (filters [filters, weights], num_bins) ->
    number."""
    topology: str = "ring"
    """ring, random or exponential. Or package.module:name of a pure function (networks, round,
    seed) -> donor of each network."""
    seed: int = 0
    """Seed of the random topology and of the shuffled coefficients."""
    reports_information = True

    def __post_init__(self) -> None:
        from dist_graft.grafting.coefficient import graft_coefficient
        from dist_graft.grafting.information import CRITERIA
        from dist_graft.grafting.topology import TOPOLOGIES

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
        require(self.num_bins >= 1, "num_bins", self.num_bins, "at least 1")
        graft_coefficient(0.0, 0.0, amplitude=self.amplitude, sensitivity=self.sensitivity)

    @classmethod
    def build(
        cls, options: Any, *, seed: int, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
    ) -> Rule:
        """Create the rule of the section graft: layer by layer, or filter by filter."""
        if options.level == "filter":
            from dist_graft.grafting.rules.filter_graft import FilterGraft

            return FilterGraft.build(options, seed=seed, units=units, tensors=tensors)
        return super().build(options, seed=seed, units=units, tensors=tensors)

    @property
    def needs_only_donor(self) -> bool:
        """Whether the topology is the ring."""
        return self.topology == "ring"

    @property
    def measured(self) -> str:
        """Name of the quantity that `information` computes."""
        return "entropy" if self.criterion in CONTROLS else self.criterion.rpartition(":")[2]

    def information(self, filters: Tensor) -> Tensor:
        """Return the information of one lead: [filters, weights per filter] -> scalar.

        It is the entropy for the criteria constant and shuffled.
        """
        import torch

        from dist_graft.grafting.information import CRITERIA

        if is_reference(self.criterion):
            return torch.as_tensor(resolve(self.criterion)(filters, self.num_bins))
        return CRITERIA[self.measured](filters, self.num_bins)

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the information of every unit's lead: [units], float64."""
        import torch

        from dist_graft.grafting.information import information_of_all
        from dist_graft.grafting.multi_tensor import multi_tensor

        filters = [unit.filters(tensors[unit.lead].detach()) for unit in units]
        if multi_tensor(filters) and not is_reference(self.criterion):
            return information_of_all(filters, self.measured, num_bins=self.num_bins)
        return torch.stack([self.information(matrix) for matrix in filters]).double()

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Keep alpha and take 1 - alpha from the donor in this round's topology."""
        import torch

        from dist_graft.grafting.coefficient import graft_coefficient
        from dist_graft.grafting.mixing import mixing_with_donor
        from dist_graft.grafting.topology import donors_of

        networks, units = information.shape
        donor = donors_of(self.topology, networks, round_, self.seed)
        own_share = graft_coefficient(
            information, information[donor], amplitude=self.amplitude, sensitivity=self.sensitivity
        )
        if self.criterion == "constant":
            own_share = torch.full_like(own_share, 0.5)
        elif self.criterion == "shuffled":
            draw = random.Random(f"{self.seed}:{round_}").getrandbits(32)
            generator = torch.Generator().manual_seed(draw)
            own_share = own_share[:, torch.randperm(units, generator=generator)]
        return mixing_with_donor(donor, own_share)
