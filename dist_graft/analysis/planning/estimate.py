"""What a round takes by each exchange and topology: arithmetic over bytes, links and rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dist_graft.analysis.planning.layout import (
    Layout,
    Traffic,
    busiest,
    p2p_moves,
    rings_moves,
    to_everyone,
    together_moves,
)
from dist_graft.analysis.planning.options import LATENCY, PlanOptions
from dist_graft.analysis.planning.sizes import Sizes
from dist_graft.grafting.topology import TOPOLOGIES
from dist_graft.population.round.buckets import Bucket, cut_buckets
from dist_graft.population.round.exchange import Exchange, bucket_limit, held_bytes

RANDOM_ROUNDS = 20
"""Of the random topology that are looked at."""
AGREEMENTS = 2
"""Small all-gathers before the weights move: the header, and what was measured."""


@dataclass(frozen=True)
class Rates:
    """How fast bytes move, in bytes a second, and what a message takes beside them."""

    inside: float
    """From and to each process, between processes of one node."""
    node: float
    """From and to each node, between nodes."""
    local: float
    """Weights that a process measures, packs, compares and blends."""
    latency: float
    """Seconds a message."""

    def seconds(self, traffic: Traffic) -> float:
        """Until the busiest link is done; all links work at the same time."""
        return max(traffic.node / self.node, traffic.inside / self.inside)


@dataclass(frozen=True)
class Estimate:
    """Of a round by one exchange in one topology."""

    exchange: Exchange
    topology: str
    received: float
    """Bytes of other networks' weights that each process receives."""
    busiest: Traffic
    """In whichever of the topology's rounds loads them most, joining the shares included."""
    seconds: float
    """Of a whole round, on average over the topology's rounds."""
    moving: float
    """Of these, seconds in which weights travel."""
    buffers: int
    """Bytes of memory that each process holds for them."""
    spread: int
    """Rounds until every network holds something of every other."""


def rates_of(options: PlanOptions) -> Rates:
    """What the options say, in bytes and seconds."""
    return Rates(
        inside=1e9 * options.bandwidth_intra,
        node=1e9 * options.bandwidth_inter,
        local=options.local,
        latency=LATENCY[options.backend],
    )


def estimates(layout: Layout, sizes: Sizes, options: PlanOptions) -> list[Estimate]:
    """Every exchange in every topology, in the order of the table."""
    return [
        estimate(
            layout,
            sizes,
            rates_of(options),
            exchange=exchange,
            topology=topology,
            on_host=options.backend == "gloo",
            bucket_bytes=max(1, int(options.bucket_mb * 2**20)),
        )
        for exchange in get_args(Exchange)
        for topology in TOPOLOGIES
    ]


def estimate(
    layout: Layout,
    sizes: Sizes,
    rates: Rates,
    *,
    exchange: Exchange,
    topology: str,
    on_host: bool,
    bucket_bytes: int,
) -> Estimate:
    """One exchange in one topology.

    A round is: measuring, packing, comparing and blending at the local rate; AGREEMENTS small
    gathers; the weights over the busiest link; each replica's share to its siblings. One after the
    other: that `p2p` packs and blends while buckets travel is not counted.

    Args:
        layout: of two networks or more.
        sizes: of one network.
        rates: of links and processes.
        exchange: all_gather or p2p.
        topology: one of ours.
        on_host: over gloo, between host memories; else NCCL between GPUs.
        bucket_bytes: what graft.bucket_mb allows, in bytes.
    """
    size, networks = sizes.round_bytes, layout.networks
    buckets = travelling(layout, sizes, exchange, bucket_bytes=bucket_bytes, on_host=on_host)
    if exchange == "p2p":
        rounds = [
            busiest(layout, p2p_moves(layout, donors, size))
            for donors in rounds_of(topology, networks)
        ]
        messages = len(buckets)
    else:
        everything = to_everyone(layout, size) if on_host else None
        rounds = [everything or busiest(layout, rings_moves(layout, size))]
        messages = len(buckets) * (networks - 1)
    joining = busiest(layout, together_moves(layout, size, on_host=on_host))
    moving = statistics.fmean(rates.seconds(traffic) for traffic in rounds)
    moving += messages * rates.latency + rates.seconds(joining)
    agreeing = AGREEMENTS * (networks - 1) * rates.latency
    donors = networks - 1 if exchange == "all_gather" else 1
    return Estimate(
        exchange=exchange,
        topology=topology,
        received=donors * size / layout.replicas,
        busiest=Traffic(
            joining.node + max(traffic.node for traffic in rounds),
            joining.inside + max(traffic.inside for traffic in rounds),
        ),
        seconds=size / rates.local + agreeing + moving,
        moving=moving,
        buffers=held_bytes(
            buckets,
            exchange,
            networks=networks,
            donors=1,
            on_host=on_host,
            replicas=layout.replicas,
        ),
        spread=rounds_to_meet(topology, networks),
    )


def travelling(
    layout: Layout, sizes: Sizes, exchange: Exchange, *, bucket_bytes: int, on_host: bool
) -> list[Bucket]:
    """The buckets that one process moves: of the whole network, or of its share."""
    return cut_buckets(
        sizes.elements,
        sizes.dtypes,
        bucket_bytes=bucket_limit(exchange, bucket_bytes, on_host=on_host),
        share=layout.replicas - 1,  # the largest
        shares=layout.replicas,
    )


def rounds_of(topology: str, networks: int) -> list[list[int]]:
    """The donors of each of a topology's rounds; of the random one the first RANDOM_ROUNDS."""
    turns = {
        "ring": 1,
        "exponential": max(1, (networks - 1).bit_length()),
        "random": RANDOM_ROUNDS,
    }
    return [TOPOLOGIES[topology](networks, round_, 0) for round_ in range(turns[topology])]


def rounds_to_meet(topology: str, networks: int) -> int:
    """Rounds until every network holds something of every other; for the random topology of seed 0.

    The ring takes K - 1: what a network holds goes one place a round. At most doubling what it has
    met, no topology takes fewer than ceil(log2 K), which the exponential one reaches.
    """
    if topology == "ring":
        return networks - 1
    everyone = (1 << networks) - 1
    met = [1 << network for network in range(networks)]
    rounds = 0
    while any(held != everyone for held in met):
        donors: Sequence[int] = TOPOLOGIES[topology](networks, rounds, 0)
        met = [met[network] | met[donor] for network, donor in enumerate(donors)]
        rounds += 1
    return rounds
