"""Which process runs on which node, and what that makes of a round's traffic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dist_graft.errors import ConfigError
from dist_graft.grafting.topology import ring


@dataclass(frozen=True)
class Layout:
    """Processes on nodes in the order of their ranks: a network's replicas side by side."""

    networks: int
    replicas: int
    per_node: int
    """Processes on a full node."""

    def __post_init__(self) -> None:
        larger, smaller = sorted((self.per_node, self.replicas), reverse=True)
        if larger % smaller:
            fitting = [n for n in range(1, self.per_node + 1) if self.per_node % n == 0]
            raise ConfigError(
                f"replicas must divide the {self.per_node} GPUs of a node or be a multiple of "
                f"them, so that networks end where nodes do: {', '.join(map(str, fitting))} or "
                f"{2 * self.per_node}, got {self.replicas}"
            )
        spare = self.free
        if spare and self.nodes > 1 and self.replicas > 1:
            step = max(1, self.per_node // self.replicas)
            lower = self.networks // step * step
            raise ConfigError(
                f"{self.networks} networks of {self.replicas} processes leave {spare} GPUs of the "
                f"last node free, and all nodes must be alike: take {lower} or {lower + step} "
                "networks"
            )

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.networks * self.replicas

    @property
    def nodes(self) -> int:
        """Nodes that the processes need."""
        return -(-self.ranks // self.per_node)

    @property
    def free(self) -> int:
        """GPUs of the last node that no process has."""
        return self.nodes * self.per_node - self.ranks

    def node_of(self, rank: int) -> int:
        """Where a process runs."""
        return rank // self.per_node

    def ranks_of(self, network: int) -> range:
        """The processes of a network."""
        return range(network * self.replicas, (network + 1) * self.replicas)

    def crossings(self) -> list[tuple[int, int]]:
        """Donor and recipient of the ring's steps from one node to another, by donor."""
        return [
            (donor, network)
            for donor, network in sorted(
                zip(ring(self.networks), range(self.networks), strict=True)
            )
            if any(
                self.node_of(giving) != self.node_of(taking)
                for giving, taking in zip(self.ranks_of(donor), self.ranks_of(network), strict=True)
            )
        ]


@dataclass(frozen=True)
class Traffic:
    """What the busiest links carry in one direction, in bytes."""

    node: float = 0.0
    """Between a node and all others."""
    inside: float = 0.0
    """Between a process and others of its node."""


Move = tuple[int, int, float]
"""Sending rank, receiving rank, bytes."""


def busiest(layout: Layout, moves: Iterable[Move]) -> Traffic:
    """What moves at the same time, link by link."""
    node: dict[tuple[str, int], float] = defaultdict(float)
    inside: dict[tuple[str, int], float] = defaultdict(float)
    for sender, receiver, size in moves:
        here, there = layout.node_of(sender), layout.node_of(receiver)
        if here == there:
            inside["out", sender] += size
            inside["in", receiver] += size
        else:
            node["out", here] += size
            node["in", there] += size
    return Traffic(max(node.values(), default=0.0), max(inside.values(), default=0.0))


def p2p_moves(layout: Layout, donors: Sequence[int], size: float) -> Iterator[Move]:
    """Each process takes its share of `size` bytes from its like in the donor."""
    for network, donor in enumerate(donors):
        if donor != network:
            for giving, taking in zip(
                layout.ranks_of(donor), layout.ranks_of(network), strict=True
            ):
                yield giving, taking, size / layout.replicas


def rings_moves(layout: Layout, size: float) -> Iterator[Move]:
    """NCCL's all-gather: everything but its own passes by each process, along the ring."""
    shares = (layout.networks - 1) * size
    return p2p_moves(layout, ring(layout.networks), shares)


def to_everyone(layout: Layout, size: float) -> Traffic:
    """All-gather over gloo: every process sends its share to its like in all other networks."""
    share = size / layout.replicas
    alike = Counter((layout.node_of(rank), rank % layout.replicas) for rank in range(layout.ranks))
    leaving: dict[int, int] = defaultdict(int)
    for (place, _), here in alike.items():
        leaving[place] += here * (layout.networks - here)
    return Traffic(max(leaving.values()) * share, (max(alike.values()) - 1) * share)


def together_moves(layout: Layout, size: float, *, on_host: bool) -> Iterator[Move]:
    """Replicas put their shares together: along a ring in each network, over gloo all with all."""
    if layout.replicas == 1:
        return
    share = size / layout.replicas
    for network in range(layout.networks):
        ranks = layout.ranks_of(network)
        for place, rank in enumerate(ranks):
            if on_host:
                yield from ((rank, other, share) for other in ranks if other != rank)
            else:
                yield rank, ranks[(place + 1) % layout.replicas], (layout.replicas - 1) * share
