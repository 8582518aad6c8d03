"""What a round did to one network."""

from __future__ import annotations

from dataclasses import dataclass

from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True)
class GraftRecord:
    """What one round did to this network; dictionaries are by graft unit name."""

    round: int
    """Number of the round, from 0."""
    network: int
    """Index in the group of this network."""
    donor: int
    """Index in the group of the network whose weights were mixed in; the first of several."""
    coefficient: dict[str, float]
    """Share that the network kept of itself."""
    information: dict[str, float]
    """Of this network before the round, in the criterion's unit (nats for entropy); empty for a
    rule that has no criterion."""
    distance: dict[str, float]
    """Euclidean distance to the donor (root mean square over several) before the round, over all
    tensors of the unit; empty where single scalars travel."""
    seconds: float
    """Of the whole round, waiting for the others included."""
    phase_seconds: dict[str, float]
    """Of measure (finite check, information), agree (with the waiting), pack, exchange, distance
    and blend."""
    bytes_received: int
    """Weights received from other networks, by all processes that hold this one together."""
    diverged: dict[int, str]
    """What was not finite, by network; empty in an ordinary round. The same in every process."""
    mixing: Mixing
    """What flowed where, of all networks; the same in every process."""
    healed: dict[int, int]
    """Whose weights a diverged network took whole, by network; the same in every process."""
