"""``dist-graft plan``: layout, traffic and memory of a population before it is started.

Everything is arithmetic over bytes: no hardware is modeled, and nothing is started. Times are those
of the bytes on the busiest link at the bandwidths given on the command line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import ModelConfig
from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError
from dist_graft.grafting.topology import TOPOLOGIES
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dist_graft.population.round.exchange import Exchange

MAX_NETWORKS = 1024
_RANDOM_ROUNDS = 20  # of the random topology, of which the busiest is shown
_NODES_SHOWN = 8
_MANY_FOR_RING = 16
_MANY_FOR_ALL_GATHER = 4
_OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}  # numbers per weight
_MIB, _GIB = 2**20, 2**30
_REMOVED = (
    *("--bandwidth-local", "--tflops", "--images", "--image-size", "--images-per-second"),
    "--epoch-seconds",
)


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Show where each network of a population runs, the bytes on each link per "
        "round, and the memory per process. Nothing is started.",
        **settings,
    )
    add = parser.add_argument
    add("--networks", type=int, required=True, help="networks of the population, K")
    add("--model", type=str, required=True, help="as train's --model.name")
    add("--replicas", type=int, default=1, help="processes per network, R; each moves 1/R of it")
    add("--gpus-per-node", type=int, default=8, help="processes per node")
    add(
        "--bandwidth-intra",
        type=float | None,
        default=None,
        help="GB/s per GPU and direction within a node; unset: no times are shown",
    )
    add(
        "--bandwidth-inter",
        type=float | None,
        default=None,
        help="GB/s per node and direction between nodes, all network adapters together; unset: no "
        "times are shown for links between nodes",
    )
    add(
        "--backend",
        type=Literal["nccl", "gloo"],
        default="nccl",
        help="nccl: between GPU memories; gloo: between host memories",
    )
    add("--bucket-mb", type=float, default=32.0, help="as train's --graft.bucket_mb")
    add(
        "--optimizer",
        type=Literal["sgd", "adamw"],
        default="sgd",
        help="sgd: momentum, one number per weight; adamw: two numbers per weight",
    )
    add(
        "--classes",
        type=int | None,
        default=None,
        help="classes of the data set; unset: 10 for models of small images, otherwise 1000",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Yield the lines of the plan.

    Raises: ConfigError for an invalid option, model or layout.
    """
    del process
    networks = options["networks"]
    require(1 <= networks <= MAX_NETWORKS, "networks", networks, f"in [1, {MAX_NETWORKS}]")
    for name in ("replicas", "gpus_per_node", "classes"):
        at_least(name.replace("_", "-"), options[name], 1)
    for name in ("bandwidth_intra", "bandwidth_inter", "bucket_mb"):
        if options[name] is not None:
            above_zero(name.replace("_", "-"), options[name])
    layout = Layout(networks, options["replicas"], options["gpus_per_node"])
    layout.check()
    size = size_of(build(options["model"], options["classes"]))
    choices: list[tuple[Exchange, str]] = [("all_gather", "ring")]
    choices += [("p2p", topology) for topology in TOPOLOGIES]
    rounds = [
        plan_round(
            layout,
            size,
            exchange=exchange,
            topology=topology,
            on_host=options["backend"] == "gloo",
            bucket_bytes=max(1, int(options["bucket_mb"] * _MIB)),
        )
        for exchange, topology in choices
        if networks > 1
    ]

    replicas = f", {layout.replicas} replicas each" if layout.replicas > 1 else ""
    yield (
        f"{networks} x {options['model']}{replicas}: {size.parameters:,} parameters, "
        f"{_bytes(size.round_bytes)} per network and round\n"
    )
    yield format_table(("node", "GPUs", "networks"), list(_nodes(layout)))
    where = "host" if options["backend"] == "gloo" else "GPU"
    held = memory(options, size, rounds)
    yield "\n" + format_table(
        (f"{where} memory per process", "MiB"),
        [(name, f"{count / _MIB:,.1f}") for name, count in held.items()],
    )
    if not rounds:
        yield "\nA single network has no rounds."
        return
    yield "\n" + format_table(
        ("exchange", "received", "busiest GPU link", "busiest node link", "time of the bytes"),
        [_row(each, options) for each in rounds],
    )
    yield (
        "\nBytes per round, in the busiest round of each topology, in one direction of the busiest "
        "link;\nreceived: by each process from other networks. 1 GB = 10^9 bytes. Not included: "
        "activations,\nlatency, computation, waiting for slower networks."
    )
    if "-" in (_row(each, options)[-1] for each in rounds):
        yield "For all times, give --bandwidth-intra and --bandwidth-inter."
    for text in warnings(layout, size, rounds):
        yield f"warning: {text}"


COMMAND = Command(
    name="plan",
    help="show layout, traffic and memory of a population",
    build_parser=build_parser,
    run=run,
    removed=dict.fromkeys(_REMOVED, "plan reports bytes and their time, not computation or epochs"),
)


@dataclass(frozen=True)
class Layout:
    """Processes on nodes in rank order; the replicas of a network have consecutive ranks."""

    networks: int
    replicas: int
    per_node: int
    """Processes on a full node."""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.networks * self.replicas

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.processes // self.per_node)

    @property
    def free(self) -> int:
        """Unused GPUs of the last node."""
        return self.nodes * self.per_node - self.processes

    def check(self) -> None:
        """Raise ConfigError unless training accepts these replicas on these nodes."""
        on_node = min(self.per_node, self.processes)
        ProcessInfo(world_size=self.processes, local_world_size=on_node).shared(self.replicas)


@dataclass(frozen=True)
class NetworkSize:
    """Tensors of one network."""

    elements: tuple[int, ...]
    """Elements of each tensor that a round mixes."""
    dtypes: tuple[torch.dtype, ...]
    """Type of each of these tensors."""
    parameters: int
    state_bytes: int
    """Bytes of all parameters and buffers."""
    trained_bytes: int
    """Bytes of the parameters that require a gradient."""

    @property
    def round_bytes(self) -> int:
        """Bytes that a round mixes: all floating-point parameters and buffers."""
        pairs = zip(self.elements, self.dtypes, strict=True)
        return sum(count * dtype.itemsize for count, dtype in pairs)


def build(name: str, classes: int | None = None) -> nn.Module:
    """Build a model without memory for its weights, unless its initialization reads them.

    Raises: ConfigError for an unknown name.
    """
    import torch

    from dist_graft.training.models import build_model, model_names

    config, num_classes = ModelConfig(name=name), classes or (10 if name in model_names() else 1000)
    try:
        with torch.device("meta"):
            return build_model(config, num_classes=num_classes, channels=3)
    except NotImplementedError:  # a weight is read, which the meta device does not have
        return build_model(config, num_classes=num_classes, channels=3)


def size_of(model: nn.Module) -> NetworkSize:
    """Count the tensors of a model, tied ones once.

    Raises: ConfigError if there is nothing to graft.
    """
    from dist_graft.grafting.units import graft_tensors

    mixed = graft_tensors(model).values()
    if not mixed:
        raise ConfigError("the model has no weights to graft")
    parameters = list(model.parameters())
    return NetworkSize(
        elements=tuple(tensor.numel() for tensor in mixed),
        dtypes=tuple(tensor.dtype for tensor in mixed),
        parameters=sum(parameter.numel() for parameter in parameters),
        state_bytes=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        trained_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
    )


Move = tuple[int, int, float]
"""Sending rank, receiving rank, bytes."""


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction of the busiest links."""

    gpu: float = 0.0
    """Between a process and other processes of its node."""
    node: float = 0.0
    """Between a node and other nodes."""

    def seconds(self, intra: float | None, inter: float | None) -> float | None:
        """Time at these bandwidths in GB/s; None if a bandwidth that matters is unknown."""
        if (self.gpu and not intra) or (self.node and not inter):
            return None
        return max(self.gpu / (1e9 * (intra or 1)), self.node / (1e9 * (inter or 1)))


@dataclass(frozen=True)
class Round:
    """Bytes of a round with one exchange and topology."""

    exchange: Exchange
    topology: str
    received: float
    """By each process from other networks."""
    exchanged: Traffic
    """Between networks, in the busiest round of the topology."""
    joined: Traffic
    """Between the replicas of a network, which then send each other their shares."""
    buffers: int
    """Buckets in each process."""


def plan_round(
    layout: Layout,
    size: NetworkSize,
    *,
    exchange: Exchange,
    topology: str,
    on_host: bool,
    bucket_bytes: int,
) -> Round:
    """Count the bytes of a round.

    Args:
        layout: two or more networks.
        size: of each network.
        exchange: all_gather or p2p.
        topology: a name in `TOPOLOGIES`.
        on_host: buckets are in host memory (gloo), not in GPU memory (NCCL).
        bucket_bytes: graft.bucket_mb in bytes.
    """
    from dist_graft.population.round.buckets import cut_buckets
    from dist_graft.population.round.exchange import bucket_limit, held_bytes

    networks, replicas = layout.networks, layout.replicas
    share = size.round_bytes / replicas
    ranks = [range(k * replicas, (k + 1) * replicas) for k in range(networks)]
    if exchange == "p2p":
        links = [
            busiest(layout, p2p_moves(ranks, donors, share))
            for donors in _donors_by_round(topology, networks)
        ]
        exchanged = Traffic(max(each.gpu for each in links), max(each.node for each in links))
    else:
        alike = list(zip(*ranks, strict=True))
        exchanged = busiest(layout, gather_moves(alike, share, direct=on_host))
    buckets = cut_buckets(
        size.elements,
        size.dtypes,
        bucket_bytes=bucket_limit(exchange, bucket_bytes, on_host=on_host),
        share=replicas - 1,  # the largest
        shares=replicas,
    )
    return Round(
        exchange=exchange,
        topology=topology,
        received=share * (networks - 1 if exchange == "all_gather" else 1),
        exchanged=exchanged,
        joined=busiest(layout, gather_moves(ranks, share, direct=on_host)),
        buffers=held_bytes(
            buckets, exchange, networks=networks, donors=1, on_host=on_host, replicas=replicas
        ),
    )


def p2p_moves(
    ranks: Sequence[Sequence[int]], donors: Sequence[int], share: float
) -> Iterator[Move]:
    """Each replica of a network receives its share from the same replica of the donor."""
    for network, donor in enumerate(donors):
        for sender, receiver in zip(ranks[donor], ranks[network], strict=True):
            yield sender, receiver, share


def gather_moves(groups: Sequence[Sequence[int]], share: float, *, direct: bool) -> Iterator[Move]:
    """All-gather in each group of ranks: every process sends its share directly to all others
    (gloo), or all shares are forwarded along a ring (NCCL).
    """
    for ranks in groups:
        for position, rank in enumerate(ranks):
            if direct:
                yield from ((rank, other, share) for other in ranks if other != rank)
            elif len(ranks) > 1:
                yield rank, ranks[(position + 1) % len(ranks)], (len(ranks) - 1) * share


def busiest(layout: Layout, moves: Iterable[Move]) -> Traffic:
    """Bytes on the busiest links, all moves together."""
    node: dict[tuple[str, int], float] = defaultdict(float)
    gpu: dict[tuple[str, int], float] = defaultdict(float)
    for sender, receiver, size in moves:
        source, target = sender // layout.per_node, receiver // layout.per_node
        if source == target:
            gpu["out", sender] += size
            gpu["in", receiver] += size
        else:
            node["out", source] += size
            node["in", target] += size
    return Traffic(max(gpu.values(), default=0.0), max(node.values(), default=0.0))


def _donors_by_round(topology: str, networks: int) -> list[list[int]]:
    period = {"ring": 1, "exponential": max(1, (networks - 1).bit_length())}
    rounds = range(period.get(topology, _RANDOM_ROUNDS))
    return [TOPOLOGIES[topology](networks, round_, 0) for round_ in rounds]


def memory(options: Options, size: NetworkSize, rounds: Sequence[Round]) -> dict[str, int]:
    """Bytes in each process, by name. The buckets of the exchanges are alternatives."""
    optimizer = options["optimizer"]
    held = {
        "parameters and buffers": size.state_bytes,
        "gradients": size.trained_bytes,
        f"optimizer ({optimizer})": _OPTIMIZER_STATES[optimizer] * size.trained_bytes,
    }
    if options["replicas"] > 1:
        held["gradient buckets of DDP"] = size.trained_bytes
    return held | {f"buckets of {each.exchange}": each.buffers for each in rounds}


def warnings(layout: Layout, size: NetworkSize, rounds: Sequence[Round]) -> Iterator[str]:
    """Choices that cost much, and what to choose instead."""
    gathered, on_ring = rounds[:2]
    if layout.free and layout.nodes > 1:
        full = layout.networks // layout.per_node * layout.per_node
        yield (
            f"{layout.free} GPUs of the last node have no network: {full} or "
            f"{full + layout.per_node} networks fill all nodes"
        )
    if layout.replicas > layout.per_node:
        gradients = 2 * (layout.replicas - 1) / layout.replicas * size.trained_bytes
        yield (
            f"each network spans several nodes: {_bytes(gradients)} of gradients cross their links "
            f"in every step; {layout.per_node} replicas or fewer avoid this"
        )
    if gathered.buffers > _GIB:
        yield (
            f"all_gather holds {gathered.buffers / _GIB:.1f} GiB of buckets in each process, p2p "
            f"{on_ring.buffers / _GIB:.2f}: use p2p, or a smaller --graft.bucket_mb"
        )
    if layout.networks > _MANY_FOR_ALL_GATHER:
        yield (
            f"with all_gather each process receives {layout.networks - 1} networks and needs one: "
            "use --graft.exchange p2p"
        )
    if layout.networks > _MANY_FOR_RING:
        yield (
            f"on the ring, weights reach all networks after {layout.networks - 1} rounds; with "
            f"--graft.topology exponential, after {(layout.networks - 1).bit_length()}"
        )


def _nodes(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Rows of the layout. Many nodes are abridged."""
    for node in range(layout.nodes):
        if layout.nodes > _NODES_SHOWN and _NODES_SHOWN - 2 <= node < layout.nodes - 1:
            if node == layout.nodes - 2:
                yield "...", "...", "..."
            continue
        first = node * layout.per_node
        end = min(first + layout.per_node, layout.processes)
        networks = sorted({first // layout.replicas, (end - 1) // layout.replicas})
        yield str(node), f"{end - first} of {layout.per_node}", "-".join(map(str, networks))


def _row(each: Round, options: Options) -> tuple[str, ...]:
    bandwidths = options["bandwidth_intra"], options["bandwidth_inter"]
    seconds = [traffic.seconds(*bandwidths) for traffic in (each.exchanged, each.joined)]
    known = [value for value in seconds if value is not None]
    return (
        each.exchange if each.exchange == "all_gather" else f"{each.exchange} {each.topology}",
        _bytes(each.received),
        _bytes(each.exchanged.gpu + each.joined.gpu),
        _bytes(each.exchanged.node + each.joined.node),
        f"{1e3 * sum(known):,.3g} ms" if len(known) == len(seconds) else "-",
    )


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            digits = 0 if size >= 100 * unit else 1 if size >= 10 * unit else 2
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} B"
