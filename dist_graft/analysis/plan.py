"""``dist-graft plan``: layout, traffic and memory of a population before it is started.

All numbers follow from bytes and from the bandwidths given on the command line. The hardware is not
modeled, and nothing is started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_bytes, format_table

_EXCHANGES = ("all_gather", "p2p ring", "p2p random", "p2p exponential")
_NODES_SHOWN = 8
_MANY_FOR_RING = 16
_MANY_FOR_ALL_GATHER = 4


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command.

    Nodes are filled in rank order. The replicas of a network have consecutive ranks.
    """

    networks: int
    """Networks of the population, K."""
    model: str
    """Same as --model.name of train."""
    replicas: int = 1
    """Processes per network, R; each moves 1/R of it."""
    gpus_per_node: int = 8
    """Processes per node."""
    bandwidth_intra: float | None = None
    """GB/s per GPU and direction within a node; unset: no times are shown."""
    bandwidth_inter: float | None = None
    """GB/s per node and direction between nodes, all network adapters together; unset: no times are
    shown for links between nodes."""
    backend: Literal["nccl", "gloo"] = "nccl"
    """nccl: between GPU memories; gloo: between host memories."""
    bucket_mb: float = 32.0
    """Same as --graft.bucket_mb of train."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: momentum, one number per weight; adamw: two numbers per weight."""
    method: str = "graft"
    """Same as --method of train; diloco keeps outer weights and momentum."""
    classes: int | None = None
    """Classes of the data set; unset: 10 for models of small images, otherwise 1000."""

    def __post_init__(self) -> None:
        require(self.method in RULES, "method", self.method, f"one of {', '.join(RULES)}")
        for name in ("networks", "replicas", "gpus_per_node", "classes"):
            at_least(name, getattr(self, name), 1)
        for name in ("bandwidth_intra", "bandwidth_inter", "bucket_mb"):
            above_zero(name, getattr(self, name))
        on_node = min(self.gpus_per_node, self.processes)
        training = ProcessInfo(world_size=self.processes, local_world_size=on_node)
        training.with_replicas(self.replicas)  # raises what training would raise

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.networks * self.replicas


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build a parser with an option for every field of `PlanOptions`."""
    parser = ArgumentParser(
        description="Show where each network of a population runs, the bytes on each link per "
        "round, and the memory per process. Nothing is started.",
        **settings,
    )
    parser.add_class_arguments(PlanOptions, nested_key=None)
    return parser


def run(values: Options, process: ProcessInfo) -> Iterator[str]:
    """Yield the lines of the plan.

    Raises: ConfigError for an invalid option, model or layout.
    """
    del process
    options = PlanOptions(**values)
    from dist_graft.analysis.planned_memory import bucket_bytes, build, memory
    from dist_graft.grafting.units import graft_tensors

    model = build(options.model, options.classes)
    mixed = list(graft_tensors(model).values())
    if not mixed:
        raise ConfigError(f"model {options.model} has no weights to graft")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mixed_bytes = sum(tensor.nbytes for tensor in mixed)
    stored, gradients = memory(options, model)
    buckets = {}
    if options.networks > 1:
        for exchange in ("all_gather", "p2p"):
            buckets[f"buckets of {exchange}"] = bucket_bytes(options, mixed, exchange)

    replicas = f", {options.replicas} replicas each" if options.replicas > 1 else ""
    yield (
        f"{options.networks} x {options.model}{replicas}: {parameters:,} parameters, "
        f"{format_bytes(mixed_bytes)} per network and round, "
        f"{format_bytes(sum(stored.values()))} per network and checkpoint\n"
    )
    yield format_table(("node", "GPUs", "networks"), _node_rows(options))
    where = "host" if options.backend == "gloo" else "GPU"
    held = stored | gradients | buckets
    yield "\n" + format_table(
        (f"{where} memory per process", "size"),
        [(name, format_bytes(size)) for name, size in held.items() if size],
    )
    if options.networks == 1:
        yield "\nA single network has no rounds."
        return
    rows = []
    for exchange in _EXCHANGES:
        *sizes, seconds = plan_round(options, mixed_bytes, exchange)
        time = "-" if math.isinf(seconds) else f"{1e3 * seconds:,.3g} ms"
        rows.append((exchange, *map(format_bytes, sizes), time))
    yield "\n" + format_table(
        ("exchange", "received", "busiest GPU link", "busiest node link", "time of the bytes"), rows
    )
    yield (
        "\nBytes per round, in one direction of the busiest link (p2p random and exponential: at "
        "most);\nreceived: by each process from other networks. 1 GB = 10^9 bytes. Not included: "
        "activations,\nlatency, computation, waiting for slower networks."
    )
    if any(row[-1] == "-" for row in rows):
        yield "For all times, give --bandwidth_intra and --bandwidth_inter."
    for text in warnings(options, gradients["gradients"], buckets["buckets of all_gather"]):
        yield f"warning: {text}"


COMMAND = Command(
    name="plan",
    help="show layout, traffic and memory of a population",
    build_parser=build_parser,
    run=run,
)


class Round(NamedTuple):
    """Bytes of a round, in one direction of the busiest links, and their time."""

    received: float
    """By each process from other networks."""
    gpu_link: float
    node_link: float
    seconds: float
    """Infinite if a bandwidth that matters is unknown."""


def plan_round(options: PlanOptions, mixed_bytes: int, exchange: str) -> Round:
    """Count the bytes of a round of two or more networks of this size.

    Each replica exchanges its share with the same replica of other networks. Then the replicas of a
    network gather their shares.
    """
    networks, replicas, per_node = options.networks, options.replicas, options.gpus_per_node
    on_host, share = options.backend == "gloo", mixed_bytes / replicas
    parts = min(replicas, per_node)  # replicas of a network on a node
    local = min(networks, max(1, per_node // replicas))  # networks on a node
    gpu, node = busiest_links(exchange, networks, local, on_host=on_host)
    exchanged = share * gpu, share * node * parts
    gpu, node = busiest_links("all_gather", replicas, parts, on_host=on_host)
    gathered = share * gpu, share * node
    return Round(
        share * (networks - 1 if exchange == "all_gather" else 1),
        exchanged[0] + gathered[0],
        exchanged[1] + gathered[1],
        _seconds(options, *exchanged) + _seconds(options, *gathered),
    )


def busiest_links(exchange: str, members: int, local: int, *, on_host: bool) -> tuple[int, int]:
    """Count the shares on the busiest link between GPUs and between nodes, in one direction.

    Each of the members has a share; `local` of them are on a node. In an all-gather over gloo every
    member sends to all others; over NCCL all shares are forwarded along a ring. For p2p topologies
    other than the ring, the counts are upper bounds.
    """
    others = members - local
    if exchange == "all_gather" and on_host:
        return local - 1, local * others
    steps = members - 1 if exchange == "all_gather" else 1
    leaving = 1 if exchange in ("all_gather", "p2p ring") else local
    return steps * min(1, local - 1), steps * min(leaving, others)


def _seconds(options: PlanOptions, gpu_link: float, node_link: float) -> float:
    times = [0.0]
    bandwidths = options.bandwidth_intra, options.bandwidth_inter
    for size, bandwidth in zip((gpu_link, node_link), bandwidths, strict=True):
        if size:
            times.append(size / (1e9 * bandwidth) if bandwidth else math.inf)
    return max(times)


def warnings(options: PlanOptions, gradient_bytes: int, gather_bytes: int) -> Iterator[str]:
    """Yield a warning for each expensive choice, with an alternative."""
    networks, per_node = options.networks, options.gpus_per_node
    free = -options.processes % per_node
    if free and options.processes > per_node:
        full = networks // per_node * per_node
        yield (
            f"{free} GPUs of the last node have no network: {full} or {full + per_node} networks "
            "fill all nodes"
        )
    if options.replicas > per_node:
        crossing = 2 * (options.replicas - 1) / options.replicas * gradient_bytes
        yield (
            f"each network spans several nodes: {format_bytes(crossing)} of gradients cross their "
            f"links in every step; {per_node} replicas or fewer avoid this"
        )
    if networks > _MANY_FOR_ALL_GATHER:
        yield (
            f"with all_gather each process receives {networks - 1} networks, needs one, and holds "
            f"{format_bytes(gather_bytes)} of buckets: use --graft.exchange p2p"
        )
    if networks > _MANY_FOR_RING:
        yield (
            f"on the ring, weights reach all networks after {networks - 1} rounds; with "
            f"--graft.topology exponential, after {(networks - 1).bit_length()}"
        )


def _node_rows(options: PlanOptions) -> list[tuple[str, str, str]]:
    """Rows of the layout: the first nodes and the last one."""
    per_node, replicas = options.gpus_per_node, options.replicas
    last = (options.processes - 1) // per_node
    rows = []
    for node in (*range(min(last, _NODES_SHOWN - 1)), last):
        ranks = range(options.processes)[node * per_node : (node + 1) * per_node]
        networks = sorted({ranks[0] // replicas, ranks[-1] // replicas})
        rows.append((str(node), f"{len(ranks)} of {per_node}", "-".join(map(str, networks))))
    if last >= _NODES_SHOWN:
        rows.insert(-1, ("...", "...", "..."))
    return rows
