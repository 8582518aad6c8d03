"""Topologies: the donor of each network in each round, as plain integers."""

from __future__ import annotations

import random
from collections.abc import Callable

from dist_graft.references import is_reference, resolve


def ring(networks: int, round_: int = 0, seed: int = 0) -> list[int]:
    """Donor of each network: network (k - 1) mod K for network k, in every round."""
    del round_, seed
    return [(network - 1) % networks for network in range(networks)]


def exponential(networks: int, round_: int, seed: int = 0) -> list[int]:
    """Donor of each network: the one at distance 1, 2, 4, ... below K, in rotation.

    After ceil(log2 K) rounds the weights of every network have reached every other network; the
    ring needs K - 1 rounds.
    """
    del seed
    turns = max(1, (networks - 1).bit_length())
    distance = 2 ** (round_ % turns)
    return [(network - distance) % networks for network in range(networks)]


def random_derangement(networks: int, round_: int, seed: int = 0) -> list[int]:
    """Donor of each network: a new random permutation without a fixed point in every round.

    The permutation is uniform over all derangements and a pure function of the arguments, so all
    ranks draw the same one without communication.
    """
    donors = list(range(networks))
    generator = random.Random(f"{seed}:{round_}")
    while networks > 1:
        generator.shuffle(donors)
        if all(donor != network for network, donor in enumerate(donors)):
            break
    return donors


TOPOLOGIES: dict[str, Callable[[int, int, int], list[int]]] = {
    "ring": ring,
    "random": random_derangement,
    "exponential": exponential,
}
"""Built-in topologies by name: (networks, round, seed) -> donor of each network."""


def donors_of(topology: str, networks: int, round_: int, seed: int) -> list[int]:
    """Return the donor of each network for a topology's name or package.module:name.

    Raises: ValueError when a user's function returns donors that do not exist, or a network as its
    own donor.
    """
    if not is_reference(topology):
        return TOPOLOGIES[topology](networks, round_, seed)
    donors = list(resolve(topology)(networks, round_, seed))
    if len(donors) != networks or not all(donor in range(networks) for donor in donors):
        raise ValueError(
            f"topology {topology} must return a donor from 0 to {networks - 1} for each network, "
            f"got {donors}"
        )
    for network, donor in enumerate(donors):
        if donor == network and networks > 1:
            raise ValueError(f"network {network} of {networks} is its own donor")
    return donors
