"""The plan as text: layout, memory, exchanges and topologies, warnings, assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_graft.analysis.planning.estimate import AGREEMENTS, Estimate, estimates, rates_of
from dist_graft.analysis.planning.layout import Layout
from dist_graft.analysis.planning.options import PlanOptions
from dist_graft.analysis.planning.sizes import (
    Images,
    Sizes,
    build,
    images_of,
    operations_per_image,
    sizes_of,
)
from dist_graft.errors import ConfigError
from dist_graft.monitoring.console import duration, table

MUCH_OF_AN_EPOCH = 0.02
MUCH_MEMORY = 2**30
MANY_RING_ROUNDS = 16
_MIB = 2**20
_STATES = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class Epoch:
    """What a round's time is compared with."""

    seconds: float
    origin: str
    """Where the number is from."""


def plan(options: PlanOptions) -> Iterator[str]:
    """Lines of the plan.

    Raises: ConfigError for a model or a layout that cannot be.
    """
    layout = Layout(options.networks, options.replicas, options.gpus_per_node)
    images = images_of(options)
    model = build(options.model, images.classes)
    sizes = sizes_of(model)
    if not sizes.elements:
        raise ConfigError(f"model {options.model} has no weights that could be grafted")
    if options.epoch_seconds or options.images_per_second:
        operations = 0.0
    else:
        operations = operations_per_image(model, images.size)
    epoch = epoch_of(options, images, operations)
    told = estimates(layout, sizes, options) if options.networks > 1 else []

    yield from _heading(options, layout, sizes)
    yield from _memory(options, sizes, told)
    if not told:
        yield "\nOne network exchanges nothing: there are no rounds."
        return
    yield f"\nA round, beside an epoch of {_epoch(epoch.seconds)}"
    yield _table(told, epoch)
    yield ""
    yield from (f"warning: {text}" for text in warnings(options, layout, sizes, told, epoch))
    yield "Assumed:"
    yield from (f"- {text}" for text in _assumptions(options, layout, images, epoch))


def epoch_of(options: PlanOptions, images: Images, operations: float) -> Epoch:
    """Seconds of an epoch without rounds; each replica trains its part of a batch."""
    if options.epoch_seconds:
        return Epoch(options.epoch_seconds, "as given")
    speed = options.images_per_second
    if speed:
        origin = f"{images.count:,} images at {speed:g} images/s a process"
    else:
        speed = options.tflops * 1e12 / operations
        origin = (
            f"{images.count:,} images of {images.size} x {images.size} pixels, "
            f"{operations / 1e9:.2f} x 10^9 operations each (forward and backward), "
            f"{options.tflops:g} x 10^12 operations a second: {speed:,.0f} images/s a process"
        )
    return Epoch(images.count / (speed * options.replicas), origin)


def _heading(options: PlanOptions, layout: Layout, sizes: Sizes) -> Iterator[str]:
    replicas = f", {layout.replicas} processes each" if layout.replicas > 1 else ""
    yield (
        f"{layout.networks} x {options.model} ({sizes.parameters:,} parameters, "
        f"{_bytes(sizes.round_bytes)} a round and network){replicas}"
    )
    place = f"{layout.nodes} nodes" if layout.nodes > 1 else "1 node"
    yield f"where    {place} of {layout.per_node} GPUs, a process each: {_spoken(layout)}"
    crossings = layout.crossings()
    if layout.nodes == 1:
        yield "ring     stays inside the node"
    elif layout.networks > 1:
        shown = ", ".join(f"{donor} to {network}" for donor, network in crossings[:3])
        more = f", ... {crossings[-1][0]} to {crossings[-1][1]}" if len(crossings) > 3 else ""
        yield f"ring     crosses between nodes in {len(crossings)} places: {shown}{more}"


def _spoken(layout: Layout) -> str:
    if layout.replicas > layout.per_node:
        return f"each network on {layout.replicas // layout.per_node} nodes of its own"
    each = layout.per_node // layout.replicas
    if layout.nodes == 1:
        return f"networks {_range(0, layout.networks)}"
    first, last = _range(0, each), _range((layout.nodes - 1) * each, layout.networks)
    return f"{each} a node, networks {first} on the first and {last} on the last"


def _range(first: int, end: int) -> str:
    return f"{first}" if end - first == 1 else f"{first}-{end - 1}"


def memory_of(options: PlanOptions, sizes: Sizes) -> dict[str, int]:
    """Bytes that a process holds whatever the exchange, by what they are."""
    held = {
        "parameters and buffers": sizes.parameter_bytes + sizes.buffer_bytes,
        "gradients": sizes.trained_bytes,
        f"optimizer ({options.optimizer})": _STATES[options.optimizer] * sizes.trained_bytes,
    }
    if options.replicas > 1:
        held["DDP's buckets of gradients"] = sizes.trained_bytes
    return held


def _memory(options: PlanOptions, sizes: Sizes, told: Sequence[Estimate]) -> Iterator[str]:
    lines = memory_of(options, sizes)
    for exchange, buffers in {each.exchange: each.buffers for each in told}.items():
        lines[f"buckets of {exchange}"] = buffers
    where = "host, for each process" if options.backend == "gloo" else "GPU"
    yield f"\nMemory of a {where}, in MiB, activations apart"
    rows = [(name, f"{size / _MIB:,.1f}") for name, size in lines.items()]
    width = max(len(name) for name, _ in rows)
    yield "\n".join(f"  {name:<{width}}  {size:>9}" for name, size in rows)


def _table(told: Sequence[Estimate], epoch: Epoch) -> str:
    header = (
        *("exchange", "topology", "to a process", "a node's link", "a GPU's link", "travelling"),
        *("round", "of an epoch", "all have met"),
    )
    rows = [
        (
            each.exchange,
            each.topology,
            _bytes(each.received),
            _bytes(each.busiest.node),
            _bytes(each.busiest.inside),
            _time(each.moving),
            _time(each.seconds),
            f"{share(each, epoch):.2%}",
            f"{each.spread} rounds",
        )
        for each in told
    ]
    return table(header, rows)


def share(each: Estimate, epoch: Epoch) -> float:
    """Of the time that an epoch takes with a round after it."""
    return each.seconds / (epoch.seconds + each.seconds)


def warnings(
    options: PlanOptions, layout: Layout, sizes: Sizes, told: Sequence[Estimate], epoch: Epoch
) -> Iterator[str]:
    """Where a choice will hurt, and what to choose instead."""
    by = {(each.exchange, each.topology): each for each in told}
    everyone, ring = by["all_gather", "ring"], by["p2p", "ring"]
    if layout.free and layout.nodes > 1:
        full = layout.networks // layout.per_node * layout.per_node
        yield (
            f"{layout.free} GPUs of the last node have no network: {full} or "
            f"{full + layout.per_node} networks fill all nodes alike, as the launch scripts start "
            "them"
        )
    if layout.replicas > layout.per_node:
        gradients = 2 * (layout.replicas - 1) / layout.replicas * sizes.trained_bytes
        seconds = gradients / rates_of(options).node
        yield (
            f"a network spans nodes: the gradients of each step cross their links "
            f"({_bytes(gradients)}, {_time(seconds)}); {layout.per_node} replicas or fewer do not"
        )
    if everyone.buffers > MUCH_MEMORY:
        yield (
            f"all_gather holds {everyone.buffers / 2**30:.1f} GiB of buckets in each process, p2p "
            f"{ring.buffers / 2**30:.2f}: take p2p, or a smaller --graft.bucket_mb"
        )
    if everyone.seconds > 1.5 * ring.seconds:
        yield (
            f"all_gather moves all {layout.networks} networks to each process where one is "
            f"needed, in {everyone.moving / ring.moving:.0f} times the time of p2p on the ring: "
            "take --graft.exchange p2p"
        )
    often = [each for each in told if share(each, epoch) > MUCH_OF_AN_EPOCH]
    for every in dict.fromkeys(_seldom(share(each, epoch)) for each in often):
        alike = [each for each in often if _seldom(share(each, epoch)) == every]
        most = max(share(each, epoch) for each in alike)
        who = ", ".join(f"{each.exchange} {each.topology}" for each in alike)
        yield (
            f"a round after each epoch takes up to {most:.1%} of the time with "
            f"{'any choice' if len(alike) == len(told) else who}: with --graft.every {every} it "
            f"is less than {MUCH_OF_AN_EPOCH:.0%}"
        )
    if layout.networks > MANY_RING_ROUNDS:
        fast = by["p2p", "exponential"]
        yield (
            f"on the ring the first network reaches the last after {ring.spread} rounds, with "
            f"--graft.topology exponential after {fast.spread}"
        )


def _seldom(part: float) -> int:
    """Epochs between rounds with which rounds take less than MUCH_OF_AN_EPOCH."""
    beside = part / (1 - part)
    return int(beside * (1 - MUCH_OF_AN_EPOCH) / MUCH_OF_AN_EPOCH) + 1


def _assumptions(
    options: PlanOptions, layout: Layout, images: Images, epoch: Epoch
) -> Iterator[str]:
    rates = rates_of(options)
    yield f"epoch: {epoch.origin}; one round after each epoch"
    if layout.replicas > 1:
        yield "R processes train a network R times as fast; each moves 1/R of it in a round"
    yield (
        f"links: {options.bandwidth_intra:g} GB/s from and to each GPU inside a node, "
        f"{options.bandwidth_inter:g} GB/s from and to each node, all adapters together, both "
        "directions at once; 1 GB = 10^9 bytes"
    )
    gather = "sends its weights to all others" if options.backend == "gloo" else "is in one ring"
    yield (
        f"{options.backend}: in all_gather each process {gather}; {rates.latency * 1e6:g} us a "
        f"message, {AGREEMENTS} small gathers before the weights move"
    )
    known = "as given" if options.bandwidth_local else "measured on one core of one machine"
    if options.backend == "nccl" and not options.bandwidth_local:
        known = "not measured"
    yield (
        f"{rates.local / 1e9:g} GB/s of weights are measured, packed, compared and blended in a "
        f"process ({known}); nothing of it beside the travelling, and nobody waits for a slower "
        "network"
    )
    yield (
        "bytes on links as in the round of a topology that loads them most, seconds as the mean "
        "over its rounds"
    )
    yield (
        "weights in fp32 as built, buckets as exchange.py cuts them; not counted: activations, "
        "NCCL's own buffers, checkpoints, evaluation"
    )


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            digits = 0 if size >= 100 * unit else 1 if size >= 10 * unit else 2
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _epoch(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"
