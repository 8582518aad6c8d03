"""Exchange of the networks' weights in flat buffers, as the donors of a Mixing require."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.population.collectives import communicating, wait_for_device
from dist_graft.population.compat import all_gather_single
from dist_graft.population.round.buckets import Bucket

Exchange = Literal["all_gather", "p2p"]
Pack = Callable[[Tensor, Bucket], None]
"""Copies between a flat buffer [bucket.length] and the tensors of a bucket."""
Received = Iterator[tuple[Bucket, dict[int, Tensor]]]
"""Buckets with the flat elements of each donor."""
POPULATION = -1
"""Key of the population mean, in place of a donor."""
IN_FLIGHT = 2
"""Buckets that `p2p` transfers at once: one is packed or blended during the other's transfer."""
_HOST_BUCKET_BYTES = 16 << 20  # larger buckets are slower in host memory


class BufferPool:
    """Flat buffers for buckets.

    CPU buffers are kept from round to round, because the first access to a page costs more than the
    copy into it. A GPU's caching allocator needs no pool.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, slot: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialized memory [length]; invalidates the slot's previous buffer."""
        if device.type != "cpu":
            return torch.empty(length, dtype=dtype, device=device)
        kept = self._kept.get((slot, dtype))
        if kept is None or len(kept) < length:
            kept = self._kept[slot, dtype] = torch.empty(length, dtype=dtype)
        return kept[:length]


@dataclass(frozen=True)
class Transport:
    """Groups, device and buffers for the transfers of one round."""

    exchange: Exchange
    group: dist.ProcessGroup
    """Group with one rank for each network."""
    replicas: dist.ProcessGroup | None
    """Group of the processes that hold this network, in order; None: this process alone."""
    device: torch.device
    """Device of the buffers; see `communication_device`."""
    bucket_bytes: int
    """Largest size of one network's part of a buffer."""
    pool: BufferPool
    phase: Callable[[str], AbstractContextManager[None]]
    """Adds the time of a block to a named phase."""
    reduces_means: bool
    """Whether a mixing with the population mean is computed by all-reduce; equal on all ranks."""
    seconds: float | None
    """Timeout of transfers; None: the group's own timeout."""
    on_wait: Callable[[float], None]
    """Called about once a second during a wait for the device; raises if a peer has died."""

    def wait_for_device(self) -> None:
        """Wait for the transfers on an accelerator; call this before the first read from it.

        Raises: CommunicationError if a peer died or did not respond in time.
        """
        wait_for_device(self.device, self.seconds, self.on_wait, group=self.group)


def communication_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device on which the group can transfer buffers of tensors on `device`.

    This is the device itself if the group has a backend other than gloo for it (gloo transfers host
    memory), otherwise the CPU.
    """
    backends = dict(
        pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair
    )
    if device.type != "cpu" and backends.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu")


def header_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device for short vectors: the CPU if the group has a backend for it.

    While waiting over gloo, a process notices a dead peer at once, handles signals and can report
    which network it waits for. NCCL supports none of this.
    """
    cpu = torch.device("cpu")
    return cpu if "cpu:" in dist.get_backend_config(group) else communication_device(group, device)


def world() -> dist.ProcessGroup:
    """Return the default process group."""
    group = dist.group.WORLD
    assert group is not None
    return group


def all_gather(
    buckets: Sequence[Bucket], pack: Pack, donors: Sequence[Sequence[int]], transport: Transport
) -> Received:
    """Gather every network on every rank, bucket by bucket.

    Holds networks x bucket on the transport's device. The sent part lies inside the receive buffer.
    Every rank of the group must iterate to the end.

    Args:
        buckets: this network's buckets.
        pack: copies a bucket of this network into a buffer.
        donors: donors of each network.
        transport: groups and buffers.

    Yields: (bucket, {donor: its elements}). The elements are valid until the next iteration.
    """
    rank, networks = dist.get_rank(transport.group), dist.get_world_size(transport.group)
    for bucket, buffer in _with_buffers(buckets, networks, transport):
        parts = list(buffer.split(bucket.length))
        with transport.phase("pack"):
            pack(parts[rank], bucket)
        with transport.phase("exchange"), communicating():
            _all_gather_in_place(buffer, parts, transport.group, transport)
        yield bucket, {donor: parts[donor] for donor in donors[rank]}


def p2p(
    buckets: Sequence[Bucket], pack: Pack, donors: Sequence[Sequence[int]], transport: Transport
) -> Received:
    """Transfer only the donors' weights, bucket by bucket.

    Holds IN_FLIGHT buckets to send, and as many for each donor, on the transport's device. Each
    bucket is packed during the transfer of the previous one, so the caller may only change the
    elements of a bucket that was yielded. Every rank of the group must iterate to the end.

    Args, yields: as `all_gather`.
    """
    group, rank = transport.group, dist.get_rank(transport.group)
    recipients = [network for network, givers in enumerate(donors) if rank in givers]
    in_flight: deque[tuple[Bucket, Sequence[Tensor], list[dist.Work]]] = deque()
    seconds = transport.seconds if transport.device.type == "cpu" else None

    def arrived() -> tuple[Bucket, dict[int, Tensor]]:
        bucket, parts, transfers = in_flight.popleft()
        with transport.phase("exchange"), communicating():
            for transfer in transfers:
                _wait(transfer, seconds)
        return bucket, dict(zip(donors[rank], parts, strict=True))

    slots = 1 + len(donors[rank])
    for bucket, buffer in _with_buffers(buckets, slots, transport, alternating=IN_FLIGHT):
        if len(in_flight) == IN_FLIGHT:
            yield arrived()
        own, *parts = buffer.split(bucket.length)
        with transport.phase("pack"):
            pack(own, bucket)
        with transport.phase("exchange"), communicating():
            operations = [
                dist.P2POp(dist.isend, own, group=group, group_peer=peer) for peer in recipients
            ] + [
                dist.P2POp(dist.irecv, part, group=group, group_peer=peer)
                for peer, part in zip(donors[rank], parts, strict=True)
            ]
            transfers = dist.batch_isend_irecv(operations) if operations else []
            in_flight.append((bucket, parts, transfers))
    while in_flight:
        yield arrived()


EXCHANGES = {"all_gather": all_gather, "p2p": p2p}


def all_reduce_mean(buckets: Sequence[Bucket], pack: Pack, transport: Transport) -> Received:
    """Average all networks on every rank, bucket by bucket.

    Sums in float32 or wider, in an order that the backend chooses, and divides the sum. All ranks
    receive the same bits. Holds one bucket on the transport's device. Every rank of the group must
    iterate to the end.

    Args: as `all_gather`; every network is a donor of all others.

    Yields: (bucket, {POPULATION: the mean of its elements}), valid until the next iteration.
    """
    networks = dist.get_world_size(transport.group)
    seconds = transport.seconds if transport.device.type == "cpu" else None
    for bucket in buckets:
        dtype = torch.promote_types(bucket.dtype, torch.float32)
        buffer = transport.pool.take(0, bucket.length, dtype, transport.device)
        with transport.phase("pack"):
            pack(buffer, bucket)
        with transport.phase("exchange"), communicating():
            work = dist.all_reduce(buffer, group=transport.group, async_op=True)
            assert work is not None  # this rank belongs to the group
            _wait(work, seconds)
            buffer /= networks
        yield bucket, {POPULATION: buffer}


def gather_replica_parts(
    cuts: Sequence[Sequence[Bucket]], pack: Pack, unpack: Pack, transport: Transport
) -> None:
    """Gather the parts that each replica of this network has blended.

    Holds replicas x bucket on the transport's device. Every rank of the replica group must call
    this.

    Args:
        cuts: buckets of each replica's part, in the order of the ranks.
        pack: copies a bucket of this replica's part into a buffer.
        unpack: copies a buffer into a bucket of another replica's part.
        transport: groups and buffers.
    """
    assert transport.replicas is not None
    rank = dist.get_rank(transport.replicas)
    for dtype in dict.fromkeys(bucket.dtype for cut in cuts for bucket in cut):
        same_dtype = [[bucket for bucket in cut if bucket.dtype == dtype] for cut in cuts]
        for buckets in zip_longest(*same_dtype):  # lengths differ by at most one element
            longest = max(bucket.length for bucket in buckets if bucket)
            buffer = transport.pool.take(0, len(cuts) * longest, dtype, transport.device)
            parts = buffer.split(longest)
            with transport.phase("pack"):
                if own := buckets[rank]:
                    pack(parts[rank][: own.length], own)
            with transport.phase("exchange"), communicating():
                _all_gather_in_place(buffer, parts, transport.replicas, transport)
            with transport.phase("blend"):
                for other, bucket in enumerate(buckets):
                    if bucket and other != rank:
                        unpack(parts[other][: bucket.length], bucket)


def _all_gather_in_place(
    buffer: Tensor, parts: Sequence[Tensor], group: dist.ProcessGroup, transport: Transport
) -> None:
    """Gather into a buffer that already holds this rank's part."""
    rank = dist.get_rank(group)
    if transport.device.type != "cpu":
        all_gather_single(buffer, parts[rank], group=group)
        return
    # Point to point, because gloo's all-gather allocates a second copy of the buffer.
    peers = [peer for peer in range(len(parts)) if peer != rank]
    sends = [dist.P2POp(dist.isend, parts[rank], group=group, group_peer=peer) for peer in peers]
    receives = [dist.P2POp(dist.irecv, parts[peer], group=group, group_peer=peer) for peer in peers]
    for transfer in dist.batch_isend_irecv(sends + receives) if peers else ():
        _wait(transfer, transport.seconds)


def _wait(transfer: dist.Work, seconds: float | None) -> None:
    """Wait for one transfer; without a timeout the group's own timeout applies."""
    transfer.wait() if seconds is None else transfer.wait(timedelta(seconds=seconds))


def bucket_limit(exchange: Exchange, bucket_bytes: int, *, on_host: bool) -> int:
    """Return the largest bucket in bytes if one network's part of a buffer may be `bucket_bytes`.

    The buckets of `p2p` that are in flight at once share the allowance.
    """
    if exchange == "p2p":
        bucket_bytes = max(1, bucket_bytes // IN_FLIGHT)
    return min(bucket_bytes, _HOST_BUCKET_BYTES) if on_host else bucket_bytes


def held_bytes(
    buckets: Sequence[Bucket],
    exchange: Exchange,
    *,
    networks: int,
    on_host: bool,
    replicas: int = 1,
) -> int:
    """Return the peak size of an exchange's buffers in one process, in bytes, with one donor.

    Args:
        buckets: buckets of this process.
        exchange: "all_gather" or "p2p".
        networks: number of networks.
        on_host: host buffers are kept for every dtype, GPU buffers are released between dtypes.
        replicas: processes that hold this network.
    """
    parts, slots = (networks, 1) if exchange == "all_gather" else (2, IN_FLIGHT)
    by_dtype = []
    for dtype in dict.fromkeys(bucket.dtype for bucket in buckets):
        sizes = [bucket.bytes for bucket in buckets if bucket.dtype == dtype]
        held = [parts * max(sizes)] * min(slots, len(sizes))
        gathered = replicas * max(sizes) if replicas > 1 else 0
        if on_host:  # the replicas' parts reuse the first slot
            held[0] = max(held[0], gathered)
        by_dtype.append(max(sum(held), gathered))
    return sum(by_dtype) if on_host else max(by_dtype, default=0)


def _with_buffers(
    buckets: Sequence[Bucket], parts: int, transport: Transport, *, alternating: int = 1
) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield each bucket with a buffer for `parts` copies of it.

    A buffer is used again after `alternating` buckets.
    """
    for dtype in dict.fromkeys(bucket.dtype for bucket in buckets):
        same_dtype = [bucket for bucket in buckets if bucket.dtype == dtype]
        length = parts * max(bucket.length for bucket in same_dtype)
        buffers = [
            transport.pool.take(slot, length, dtype, transport.device)
            for slot in range(min(alternating, len(same_dtype)))
        ]
        for number, bucket in enumerate(same_dtype):
            yield bucket, buffers[number % alternating][: parts * bucket.length]
        del buffers
