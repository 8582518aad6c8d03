"""Record of a round, as seen by one network."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True)
class GraftRecord:
    """Result of a round for one network. Dictionaries are keyed by graft unit name."""

    round: int
    """Number of the round, 0-based."""
    network: int
    """Index of this network in the group."""
    donor: int
    """Index of the donor in the group; the first one if there are several; -1 in a round of the
    exchange "files" that found none."""
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
    """Shares of all networks; identical on every rank. Exchange "files": only the row of this
    network was applied, and the other rows are those of networks that keep their weights."""
    healed: dict[int, int]
    """Network whose weights a diverged network copied, by network; identical on every rank."""
    lags: dict[int, float] = field(default_factory=dict)
    """Exchange "files": epochs by which each donor's publication was behind (negative: ahead)."""
    donor_epoch: float | None = None
    """Exchange "files": epochs that `donor` had finished when it published."""
    digest: str | None = None
    """Exchange "files": sha256 of the donor's publication."""
