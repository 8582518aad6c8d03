"""Averaging (local SGD): every network becomes the mean of all networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True, kw_only=True)
class Average:
    """Local SGD: every network becomes the mean of all."""

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Nothing to tell: [units] zeros."""
        del tensors
        return torch.zeros(len(units), dtype=torch.float64)

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """A share of 1 / K of each network, in every unit."""
        del round_
        return pull_to_mean(*information.shape, keep=0.0)


def pull_to_mean(networks: int, units: int, *, keep: float) -> Mixing:
    """Each network becomes `keep` of itself and 1 - keep of the population's mean."""
    row = (1 - keep) / networks
    own = torch.eye(networks, dtype=torch.float64)
    return Mixing(
        shares=(row * torch.ones_like(own) + keep * own).expand(units, -1, -1).clone(),
        donors=tuple(
            tuple(other for other in range(networks) if other != network)
            for network in range(networks)
        ),
    )
