"""Who gives to whom in which round, as plain integers."""

from __future__ import annotations

import random
from collections.abc import Callable

from dist_graft.references import is_reference, resolve


def ring(networks: int, round_: int = 0, seed: int = 0) -> list[int]:
    """Donor of each network: network k takes from network (k - 1) mod K, in every round."""
    del round_, seed
    return [(network - 1) % networks for network in range(networks)]


def exponential(networks: int, round_: int, seed: int = 0) -> list[int]:
    """Donor of each network at distance 1, 2, 4, ... in turn, all below K.

    After ceil(log2 K) rounds every network has taken from every other, directly or not; the ring
    needs K - 1.
    """
    del seed
    turns = max(1, (networks - 1).bit_length())
    distance = 2 ** (round_ % turns)
    return [(network - distance) % networks for network in range(networks)]


def random_derangement(networks: int, round_: int, seed: int = 0) -> list[int]:
    """A new donor for each network in each round, never itself; every network gives once.

    A pure function of the arguments, so all processes find the same one without communication;
    uniform over the permutations without a fixed point.
    """
    donors = list(range(networks))
    draw = random.Random(f"{seed}:{round_}")
    while networks > 1:
        draw.shuffle(donors)
        if all(donor != network for network, donor in enumerate(donors)):
            break
    return donors


TOPOLOGIES: dict[str, Callable[[int, int, int], list[int]]] = {
    "ring": ring,
    "random": random_derangement,
    "exponential": exponential,
}
"""By name: (networks, round, seed) -> donor of each network."""


def donors_of(topology: str, networks: int, round_: int, seed: int) -> list[int]:
    """Donor of each network by a topology's name or package.module:name.

    Raises: ValueError when a function of the user's names donors that are not there.
    """
    if not is_reference(topology):
        return TOPOLOGIES[topology](networks, round_, seed)
    donors = list(resolve(topology)(networks, round_, seed))
    if len(donors) != networks or not all(donor in range(networks) for donor in donors):
        raise ValueError(
            f"{topology} must name a donor in 0 ... {networks - 1} for each of the networks, got "
            f"{donors}"
        )
    return donors
