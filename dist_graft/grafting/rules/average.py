"""Averaging, also known as local SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_graft.grafting.rules.base import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True, kw_only=True)
class Average(Rule):
    """Local SGD (arXiv 1805.09767): every network becomes the population mean.

    theta_k <- 1/K sum_j theta_j. Rounds take place as set by graft.every, by default after every
    epoch.
    """

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Give every network a share of 1/K in every unit."""
        from dist_graft.grafting.mixing import mixing_with_mean

        del round_
        return mixing_with_mean(*information.shape)
