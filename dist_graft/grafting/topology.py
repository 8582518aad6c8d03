"""Who gives to whom, as plain integers."""

from __future__ import annotations


def ring(networks: int) -> list[int]:
    """Donor of each network: network k takes from network (k - 1) mod K."""
    return [(network - 1) % networks for network in range(networks)]
