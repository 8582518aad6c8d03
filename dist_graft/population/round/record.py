"""Record of a round, as seen by one network."""

from __future__ import annotations

from dataclasses import dataclass

from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True)
class GraftRecord:
    """Result of a round for one network. Dictionaries are keyed by graft unit name."""

    round: int
    """Number of the round, 0-based."""
    network: int
    """Index of this network in the group."""
    donor: int
    """Index of the donor in the group; the first one if there are several."""
    coefficient: dict[str, float]
    """Share that the network kept of its weights."""
    information: dict[str, float]
    """Information of this network before the round, in the criterion's unit (nats for entropy);
    empty for rules without a criterion."""
    distance: dict[str, float]
    """Euclidean distance to the donor before the round (root mean square over several donors), over
    all tensors of the unit; empty if only scalars are exchanged."""
    seconds: float
    """Duration of the round, including the wait for other networks."""
    phase_seconds: dict[str, float]
    """Seconds by phase: measure (finiteness check, information), agree (including the wait), pack,
    exchange, distance, blend."""
    bytes_received: int
    """Bytes of other networks' weights, summed over this network's replicas."""
    diverged: dict[int, str]
    """Description of what was not finite, by network; identical on every rank."""
    mixing: Mixing
    """Shares of all networks; identical on every rank."""
    healed: dict[int, int]
    """Network whose weights a diverged network copied, by network; identical on every rank."""
