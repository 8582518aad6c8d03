"""What a round becomes when networks have diverged: rows of its Mixing are replaced."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True, eq=False)
class Overridden(Mixing):
    """A mixing of which some rows are no longer the rule's."""

    planned: Mixing
    """The rule's."""
    replaced: frozenset[int]
    """Networks whose whole row was replaced."""

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """As planned where the row is the rule's; else the unit's fraction holds."""
        if network in self.replaced:
            return None
        return self.planned.tensor_fraction(network, donor, unit, key, shape, buffer=buffer)


def without_diverged(mixing: Mixing, diverged: Collection[int], *, heal: bool) -> Mixing:
    """The mixing in which nobody takes from a diverged network.

    Args:
        mixing: what the rule decided.
        diverged: networks whose weights are of no use; at least one is not.
        heal: a diverged network becomes its healer as that was before the round (see `healer`);
            else it stays as it is.

    Returns: a Mixing of which the other networks' rows lack the diverged donors, as
        `Mixing.row_without` says.

    Raises: ValueError when all networks diverged.
    """
    if len(set(diverged)) == mixing.networks:
        raise ValueError("all networks diverged: there is none to take weights from")
    shares = mixing.shares.clone()
    donors: list[tuple[int, ...]] = []
    for network, planned in enumerate(mixing.donors):
        if network in diverged:
            source = healer(mixing.donors, network, diverged) if heal else network
            shares[:, network] = 0.0
            shares[:, network, source] = 1.0
            donors.append((source,) if heal else ())
        else:
            shares[:, network] = mixing.row_without(network, diverged)
            donors.append(tuple(donor for donor in planned if donor not in diverged))
    return Overridden(
        shares=shares, donors=tuple(donors), planned=mixing, replaced=frozenset(diverged)
    )


def healer(donors: Sequence[Sequence[int]], network: int, diverged: Collection[int]) -> int:
    """Whose weights a diverged network takes: its donor's, or the nearest sound one's upstream.

    Where networks have several donors, or the donors' donors lead back without a sound one,
    upstream is the ring: network - 1, network - 2, ...

    Raises: ValueError when all networks diverged.
    """
    seen, other = {network}, network
    while len(donors[other]) == 1 and donors[other][0] not in seen:
        (other,) = donors[other]
        if other not in diverged:
            return other
        seen.add(other)
    networks = len(donors)
    upstream = ((network - distance) % networks for distance in range(1, networks))
    sound = next((other for other in upstream if other not in diverged), None)
    if sound is None:
        raise ValueError("all networks diverged: there is none to take weights from")
    return sound
