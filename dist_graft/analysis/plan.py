"""``dist-graft plan``: layout, traffic and memory of a population before it is started.

All numbers follow from bytes and from the bandwidths given on the command line. The hardware is not
modeled, and nothing is started.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import ModelConfig
from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.topology import TOPOLOGIES
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dist_graft.grafting.rules import Rule
    from dist_graft.population.round.exchange import Exchange

MAX_NETWORKS = 1024
_ROUNDS = 20  # of each topology, of which the busiest counts; a period of ring and exponential
_NODES_SHOWN = 8
_MANY_FOR_RING = 16
_MANY_FOR_ALL_GATHER = 4
_OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}  # numbers per weight
_MIB, _GIB = 2**20, 2**30
_REMOVED = "bandwidth-local", "tflops", "images", "image-size", "images-per-second", "epoch-seconds"


def _option(text: str, default: Any = MISSING) -> Any:
    """A field that is an option of the command, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command, and the layout of the processes that follows from them.

    Nodes are filled in rank order. The replicas of a network have consecutive ranks.
    """

    networks: int = _option("networks of the population, K")
    model: str = _option("same as --model.name of train")
    replicas: int = _option("processes per network, R; each moves 1/R of it", 1)
    gpus_per_node: int = _option("processes per node", 8)
    bandwidth_intra: float | None = _option(
        "GB/s per GPU and direction within a node; unset: no times are shown", None
    )
    bandwidth_inter: float | None = _option(
        "GB/s per node and direction between nodes, all network adapters together; unset: no times "
        "are shown for links between nodes",
        None,
    )
    backend: Literal["nccl", "gloo"] = _option(
        "nccl: between GPU memories; gloo: between host memories", "nccl"
    )
    bucket_mb: float = _option("same as --graft.bucket_mb of train", 32.0)
    optimizer: Literal["sgd", "adamw"] = _option(
        "sgd: momentum, one number per weight; adamw: two numbers per weight", "sgd"
    )
    method: str = _option(
        "same as --method of train; diloco keeps outer weights and momentum", "graft"
    )
    classes: int | None = _option(
        "classes of the data set; unset: 10 for models of small images, otherwise 1000", None
    )

    def __post_init__(self) -> None:
        legal = 1 <= self.networks <= MAX_NETWORKS
        require(legal, "networks", self.networks, f"in [1, {MAX_NETWORKS}]")
        require(self.method in RULES, "method", self.method, f"one of {', '.join(RULES)}")
        for name in ("replicas", "gpus_per_node", "classes"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        for name in ("bandwidth_intra", "bandwidth_inter", "bucket_mb"):
            if getattr(self, name) is not None:
                above_zero(name.replace("_", "-"), getattr(self, name))
        on_node = min(self.gpus_per_node, self.processes)
        training = ProcessInfo(world_size=self.processes, local_world_size=on_node)
        training.with_replicas(self.replicas)  # raises what training would raise

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.networks * self.replicas

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.processes // self.gpus_per_node)

    @property
    def free(self) -> int:
        """Unused GPUs of the last node."""
        return self.nodes * self.gpus_per_node - self.processes


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Show where each network of a population runs, the bytes on each link per "
        "round, and the memory per process. Nothing is started.",
        **settings,
    )
    types = get_type_hints(PlanOptions)
    for option in fields(PlanOptions):
        default = {"required": True} if option.default is MISSING else {"default": option.default}
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=types[option.name],
            help=option.metadata["help"],
            **default,
        )
    return parser


def run(values: Options, process: ProcessInfo) -> Iterator[str]:
    """Yield the lines of the plan.

    Raises: ConfigError for an invalid option, model or layout.
    """
    del process
    options = PlanOptions(**{option.name: values[option.name] for option in fields(PlanOptions)})
    size = size_of(build(options.model, options.classes), RULES[options.method]())
    rounds = []
    if options.networks > 1:
        rounds = [plan_round(options, size, "all_gather", "ring")]
        rounds += [plan_round(options, size, "p2p", topology) for topology in TOPOLOGIES]

    replicas = f", {options.replicas} replicas each" if options.replicas > 1 else ""
    yield (
        f"{options.networks} x {options.model}{replicas}: {size.parameters:,} parameters, "
        f"{_bytes(size.round_bytes)} per network and round, "
        f"{_bytes(checkpoint_bytes(options, size))} per network and checkpoint\n"
    )
    yield format_table(("node", "GPUs", "networks"), _nodes(options))
    where = "host" if options.backend == "gloo" else "GPU"
    yield "\n" + format_table(
        (f"{where} memory per process", "MiB"),
        [(name, f"{count / _MIB:,.1f}") for name, count in memory(options, size, rounds).items()],
    )
    if not rounds:
        yield "\nA single network has no rounds."
        return
    rows = [_row(each, options) for each in rounds]
    yield "\n" + format_table(
        ("exchange", "received", "busiest GPU link", "busiest node link", "time of the bytes"), rows
    )
    yield (
        "\nBytes per round, in the busiest round of each topology, in one direction of the busiest "
        "link;\nreceived: by each process from other networks. 1 GB = 10^9 bytes. Not included: "
        "activations,\nlatency, computation, waiting for slower networks."
    )
    if any(row[-1] == "-" for row in rows):
        yield "For all times, give --bandwidth-intra and --bandwidth-inter."
    for text in warnings(options, size, rounds):
        yield f"warning: {text}"


COMMAND = Command(
    name="plan",
    help="show layout, traffic and memory of a population",
    build_parser=build_parser,
    run=run,
    removed={
        f"--{name}": "plan reports bytes and their time, not computation or epochs"
        for name in _REMOVED
    },
)


@dataclass(frozen=True)
class NetworkSize:
    """Tensors of one network."""

    elements: tuple[int, ...]
    """Elements of each tensor that a round mixes."""
    dtypes: tuple[torch.dtype, ...]
    """dtype of each of these tensors."""
    parameters: int
    state_bytes: int
    """Bytes of all parameters and buffers."""
    trained_bytes: int
    """Bytes of the parameters that require a gradient."""
    rule_bytes: int = 0
    """Bytes of the tensors that the method keeps between rounds."""

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
    except NotImplementedError:  # the meta device has no values to read
        return build_model(config, num_classes=num_classes, channels=3)


def size_of(model: nn.Module, rule: Rule | None = None) -> NetworkSize:
    """Count the tensors of a model and of a rule's state; tied tensors count once.

    Raises: ConfigError if there is nothing to graft.
    """
    from dist_graft.grafting.units import graft_tensors, graft_units

    tensors = graft_tensors(model)
    mixed = tensors.values()
    if not mixed:
        raise ConfigError("the model has no weights to graft")
    state = rule.init_state(graft_units(model), tensors) if rule else {}
    parameters = list(model.parameters())
    return NetworkSize(
        elements=tuple(tensor.numel() for tensor in mixed),
        dtypes=tuple(tensor.dtype for tensor in mixed),
        parameters=sum(parameter.numel() for parameter in parameters),
        state_bytes=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        trained_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
        rule_bytes=sum(tensor.nbytes for tensor in state.values()),
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
    """Between the replicas of a network, which send each other their shares after the exchange."""
    buffers: int
    """Buckets in each process."""


def plan_round(options: PlanOptions, size: NetworkSize, exchange: Exchange, topology: str) -> Round:
    """Count the bytes of a round between two or more networks."""
    from dist_graft.population.round.buckets import cut_buckets
    from dist_graft.population.round.exchange import bucket_limit, held_bytes

    networks, replicas, on_host = options.networks, options.replicas, options.backend == "gloo"
    share = size.round_bytes / replicas
    ranks = [range(k * replicas, (k + 1) * replicas) for k in range(networks)]
    if exchange == "p2p":
        donors = [TOPOLOGIES[topology](networks, number, 0) for number in range(_ROUNDS)]
        links = [busiest(options, p2p_moves(ranks, by_network, share)) for by_network in donors]
        exchanged = Traffic(max(each.gpu for each in links), max(each.node for each in links))
    else:
        same_replica = list(zip(*ranks, strict=True))
        exchanged = busiest(options, gather_moves(same_replica, share, direct=on_host))
    bucket_bytes = max(1, int(options.bucket_mb * _MIB))
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
        joined=busiest(options, gather_moves(ranks, share, direct=on_host)),
        buffers=held_bytes(
            buckets, exchange, networks=networks, donors=1, on_host=on_host, replicas=replicas
        ),
    )


def p2p_moves(
    ranks: Sequence[Sequence[int]], donors: Sequence[int], share: float
) -> Iterator[Move]:
    """Yield the moves of each replica's share, from the same replica of the donor."""
    for network, donor in enumerate(donors):
        for sender, receiver in zip(ranks[donor], ranks[network], strict=True):
            yield sender, receiver, share


def gather_moves(groups: Sequence[Sequence[int]], share: float, *, direct: bool) -> Iterator[Move]:
    """Yield the moves of an all-gather in each group of ranks.

    Every process sends its share directly to all others (gloo), or all shares are forwarded along
    a ring (NCCL).
    """
    for ranks in groups:
        for position, rank in enumerate(ranks):
            if direct:
                yield from ((rank, other, share) for other in ranks if other != rank)
            elif len(ranks) > 1:
                yield rank, ranks[(position + 1) % len(ranks)], (len(ranks) - 1) * share


def busiest(options: PlanOptions, moves: Iterable[Move]) -> Traffic:
    """Add up all moves and return the bytes on the busiest links."""
    node: dict[tuple[str, int], float] = defaultdict(float)
    gpu: dict[tuple[str, int], float] = defaultdict(float)
    for sender, receiver, size in moves:
        source, target = sender // options.gpus_per_node, receiver // options.gpus_per_node
        if source == target:
            gpu["out", sender] += size
            gpu["in", receiver] += size
        else:
            node["out", source] += size
            node["in", target] += size
    return Traffic(max(gpu.values(), default=0.0), max(node.values(), default=0.0))


def memory(options: PlanOptions, size: NetworkSize, rounds: Sequence[Round]) -> dict[str, int]:
    """Bytes in each process, by name. The buckets of the exchanges are alternatives."""
    held = {
        "parameters and buffers": size.state_bytes,
        "gradients": size.trained_bytes,
        f"optimizer ({options.optimizer})": optimizer_bytes(options, size),
    }
    if size.rule_bytes:
        held[f"state of {options.method}"] = size.rule_bytes
    if options.replicas > 1:
        held["gradient buckets of DDP"] = size.trained_bytes
    return held | {f"buckets of {each.exchange}": each.buffers for each in rounds}


def checkpoint_bytes(options: PlanOptions, size: NetworkSize) -> int:
    """Bytes of one network in a checkpoint: weights, and state of the optimizer and method."""
    return size.state_bytes + optimizer_bytes(options, size) + size.rule_bytes


def optimizer_bytes(options: PlanOptions, size: NetworkSize) -> int:
    """Bytes of the optimizer's state in each process."""
    return _OPTIMIZER_STATES[options.optimizer] * size.trained_bytes


def warnings(options: PlanOptions, size: NetworkSize, rounds: Sequence[Round]) -> Iterator[str]:
    """Yield a warning for each expensive choice, with an alternative."""
    gathered, on_ring = rounds[:2]
    if options.free and options.nodes > 1:
        full = options.networks // options.gpus_per_node * options.gpus_per_node
        yield (
            f"{options.free} GPUs of the last node have no network: {full} or "
            f"{full + options.gpus_per_node} networks fill all nodes"
        )
    if options.replicas > options.gpus_per_node:
        gradients = 2 * (options.replicas - 1) / options.replicas * size.trained_bytes
        yield (
            f"each network spans several nodes: {_bytes(gradients)} of gradients cross their links "
            f"in every step; {options.gpus_per_node} replicas or fewer avoid this"
        )
    if gathered.buffers > _GIB:
        yield (
            f"all_gather holds {gathered.buffers / _GIB:.1f} GiB of buckets in each process, p2p "
            f"{on_ring.buffers / _GIB:.2f}: use p2p, or a smaller --graft.bucket_mb"
        )
    if options.networks > _MANY_FOR_ALL_GATHER:
        yield (
            f"with all_gather each process receives {options.networks - 1} networks and needs one: "
            "use --graft.exchange p2p"
        )
    if options.networks > _MANY_FOR_RING:
        yield (
            f"on the ring, weights reach all networks after {options.networks - 1} rounds; with "
            f"--graft.topology exponential, after {(options.networks - 1).bit_length()}"
        )


def _nodes(options: PlanOptions) -> list[tuple[str, str, str]]:
    """Rows of the layout. Many nodes are abridged."""
    rows = []
    for node, first in enumerate(range(0, options.processes, options.gpus_per_node)):
        end = min(first + options.gpus_per_node, options.processes)
        networks = sorted({first // options.replicas, (end - 1) // options.replicas})
        rows.append(
            (str(node), f"{end - first} of {options.gpus_per_node}", "-".join(map(str, networks)))
        )
    if len(rows) > _NODES_SHOWN:
        rows[_NODES_SHOWN - 2 : -1] = [("...", "...", "...")]
    return rows


def _row(each: Round, options: PlanOptions) -> tuple[str, ...]:
    bandwidths = options.bandwidth_intra, options.bandwidth_inter
    exchanged, joined = each.exchanged.seconds(*bandwidths), each.joined.seconds(*bandwidths)
    return (
        each.exchange if each.exchange == "all_gather" else f"{each.exchange} {each.topology}",
        _bytes(each.received),
        _bytes(each.exchanged.gpu + each.joined.gpu),
        _bytes(each.exchanged.node + each.joined.node),
        "-" if exchanged is None or joined is None else f"{1e3 * (exchanged + joined):,.3g} ms",
    )


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            digits = 0 if size >= 100 * unit else 1 if size >= 10 * unit else 2
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} B"
