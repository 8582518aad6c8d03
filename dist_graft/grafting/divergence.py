"""Handling of diverged networks: rows of a round's Mixing are replaced."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_graft.grafting.mixing import EqualMean, Mixing


@dataclass(frozen=True, eq=False)
class Overridden(Mixing):
    """A mixing in which the rows of some networks replace those that the rule decided."""

    planned: Mixing
    """The mixing that the rule decided."""
    replaced: frozenset[int]
    """Networks whose entire row was replaced."""

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """Return the planned weights; None for replaced rows, where the unit's fraction applies."""
        if network in self.replaced:
            return None
        return self.planned.tensor_fraction(network, donor, unit, key, shape, buffer=buffer)


def without_diverged(mixing: Mixing, diverged: Collection[int], *, heal: bool) -> Mixing:
    """Return the mixing without diverged donors.

    Args:
        mixing: the mixing that the rule decided.
        diverged: networks whose weights or losses are not finite.
        heal: whether a diverged network copies its healer (see `healer`); otherwise it keeps its
            weights. With an EqualMean it becomes the mean of the finite networks.

    Returns: a Mixing in which the other networks' rows exclude the diverged donors; see
        `Mixing.row_without`.

    Raises: ValueError when all networks diverged.
    """
    if len(set(diverged)) == mixing.networks:
        raise ValueError("all networks diverged: there are no weights to copy")
    shares = mixing.shares.clone()
    donors: list[tuple[int, ...]] = []
    equal = isinstance(mixing, EqualMean)
    for network, planned in enumerate(mixing.donors):
        if network in diverged and not equal:
            source = healer(mixing.donors, network, diverged) if heal else network
            shares[:, network] = 0.0
            shares[:, network, source] = 1.0
            donors.append((source,) if heal else ())
        else:
            shares[:, network] = mixing.row_without(network, diverged)
            donors.append(tuple(donor for donor in planned if donor not in diverged))
    if equal:
        return EqualMean(shares=shares, donors=tuple(donors))
    return Overridden(
        shares=shares, donors=tuple(donors), planned=mixing, replaced=frozenset(diverged)
    )


def healer(donors: Sequence[Sequence[int]], network: int, diverged: Collection[int]) -> int:
    """Return the network that a diverged network copies: the nearest upstream that is finite.

    Upstream follows the donor, the donor's donor, and so on. Where a network has several donors, or
    the donors form a cycle without a finite network, it follows the ring: network - 1, network - 2,
    and so on.

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
    finite = next((other for other in upstream if other not in diverged), None)
    if finite is None:
        raise ValueError("all networks diverged: there are no weights to copy")
    return finite
