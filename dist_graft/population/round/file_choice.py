"""Which publications a network uses in a round, and how, as pure functions without files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dist_graft.errors import NonFiniteError
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.base import Rule


@dataclass(frozen=True, order=True)
class Place:
    """How far a network has trained."""

    epoch: int
    """Epochs finished."""
    step: int = 0
    """Steps finished in the current epoch."""
    steps_per_epoch: int = field(default=1, compare=False)

    @property
    def epochs(self) -> float:
        """The place in epochs."""
        return self.epoch + self.step / self.steps_per_epoch

    def lag_of(self, other: Place) -> float:
        """Epochs by which another network is behind; negative if it is ahead."""
        return self.epochs - other.epochs


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a publication says about its network, besides the weights."""

    network: int
    place: Place
    round: int
    """Rounds that the network had finished."""
    schema: str
    """Digest of tensors, graft units and rule, which must be those of the reader."""
    information: tuple[float, ...]
    """What the rule measured; empty if the network diverged."""
    lr: float | None = None
    resume: Place | None = None
    """Where the network's job would resume from its latest checkpoint; None: unknown."""
    diverged: str = ""
    """What is not finite in the network; its publication then holds no weights."""
    units: int = 0
    """Number of graft units."""
    digest: str = ""
    """sha256 over everything above and the checksums of all tensors."""


def usable(own: Place, others: Iterable[Place], max_lag: float) -> list[Place]:
    """Places of one network's publications within `max_lag` epochs, the newest first."""
    if max_lag == 0:
        return [other for other in others if other == own]
    return sorted((other for other in others if abs(own.lag_of(other)) <= max_lag), reverse=True)


def upstream(network: int, networks: Sequence[int]) -> list[int]:
    """The other networks, from the donor on the ring to the farthest one."""
    size = max(networks) + 1
    return sorted(
        (other for other in networks if other != network),
        key=lambda other: (network - other) % size,
    )


def needed_from(resume: Mapping[int, Place | None], networks: Collection[int]) -> Place:
    """First place from which some network may repeat its rounds.

    Args:
        resume: where each network's job would resume; None or missing: unknown, from the start.
        networks: all networks of the population.
    """
    return min(resume.get(network) or Place(0) for network in networks)


def needs_step(rule: Rule) -> str:
    """Message of the error for a rule that independent jobs cannot use."""
    return (
        f"{type(rule).__name__} needs all networks at the same step, which independent jobs "
        "(exchange 'files') cannot provide: use 'all_gather' or 'p2p'"
    )


@dataclass(frozen=True)
class Decided:
    """The mixing of a round, as one network decided it."""

    mixing: Mixing
    """Of the networks that are present."""
    present: list[int]
    """Their numbers, in order."""
    row: int
    """Index of the deciding network in `present`."""
    diverged: dict[int, str]
    """What is not finite, by network."""

    def for_population(self, networks: int) -> Mixing:
        """Return the network's row as a mixing of the whole population.

        The other networks keep their weights there: they decide on their own.

        Args:
            networks: expected size of the population.
        """
        mixing, present, network = self.mixing, self.present, self.present[self.row]
        size = max(networks, present[-1] + 1)
        shares = torch.eye(size, dtype=torch.float64).repeat(mixing.shares.shape[0], 1, 1)
        shares[:, network] = 0.0
        shares[:, network, present] = mixing.shares[:, self.row]
        donors: list[tuple[int, ...]] = [()] * size
        donors[network] = tuple(present[donor] for donor in mixing.donors[self.row])
        return Mixing(shares=shares, donors=tuple(donors))


def decide_among(
    rule: Rule, own: Published, others: Sequence[Published], *, rate: float, heal: bool
) -> Decided:
    """Decide a round among the networks that are present; the ring closes over them.

    Args:
        rule: of the population.
        own: this network.
        others: networks that have a usable publication.
        rate: factor for every donor's share, in [0, 1].
        heal: whether a diverged network copies its donor; otherwise it keeps its weights.

    Raises: NonFiniteError when all of several networks diverged; ValueError for a rule that needs
        all networks at the same step.
    """
    by_network = {published.network: published for published in (own, *others)}
    present = sorted(by_network)
    row = present.index(own.network)
    diverged = {
        network: published.diverged
        for network, published in sorted(by_network.items())
        if published.diverged
    }
    if len(diverged) == len(present):
        if others:
            raise NonFiniteError.of_networks(diverged, own.round)
        keeps = Mixing(shares=torch.ones(own.units, 1, 1, dtype=torch.float64), donors=((),))
        return Decided(keeps, present, row, diverged)  # no finite network to copy
    length = max(len(published.information) for published in by_network.values())
    matrix = torch.zeros(len(present), length, dtype=torch.float64)
    for index, network in enumerate(present):
        if network not in diverged:
            matrix[index] = torch.tensor(by_network[network].information, dtype=torch.float64)
    mixing = rule.decide(matrix, own.round)
    if mixing.moves_scalars:
        raise ValueError(needs_step(rule))
    if rate != 1.0:
        mixing = mixing.scaled(rate)
    if diverged:
        mixing = without_diverged(mixing, [present.index(other) for other in diverged], heal=heal)
    return Decided(mixing, present, row, diverged)
