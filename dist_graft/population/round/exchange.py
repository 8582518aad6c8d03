"""Moves flat buffers between networks; the Mixing says which must travel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import zip_longest
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.population.collectives import communicating
from dist_graft.population.round.buckets import Bucket

Exchange = Literal["all_gather", "p2p"]
Phase = Callable[[str], AbstractContextManager[None]]
Pack = Callable[[Tensor, Bucket], None]
IN_FLIGHT = 2
"""Buckets of `p2p` that travel at once: one is packed and blended while another is under way."""
_HOST_BUCKET_BYTES = 16 << 20  # larger ones are slower there, though fewer
Received = Iterator[tuple[Bucket, dict[int, Tensor]]]


class BufferPool:
    """Flat memory that buckets travel in.

    On the CPU it is kept from round to round: the first touch of a page costs more than the copy
    that fills it. A GPU's allocator keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, slot: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory, [length]; what was taken for the slot before is taken back."""
        if device.type != "cpu":
            return torch.empty(length, dtype=dtype, device=device)
        kept = self._kept.get((slot, dtype))
        if kept is None or len(kept) < length:
            kept = self._kept[slot, dtype] = torch.empty(length, dtype=dtype)
        return kept[:length]


def communication_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where buffers must lie to travel in this group, for tensors that live on `device`.

    The device itself when a backend of the group serves it and is not gloo, which moves host
    memory; else the CPU.
    """
    served = dict(
        pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair
    )
    if device.type != "cpu" and served.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu")


def header_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where short vectors travel: the CPU when a backend of the group serves it.

    Over gloo a process that waits sees at once that a peer died, serves signals, and can say whom
    it waits for; NCCL does none of this.
    """
    cpu = torch.device("cpu")
    return cpu if "cpu:" in dist.get_backend_config(group) else communication_device(group, device)


def world() -> dist.ProcessGroup:
    """The default group; init_process_group has been called."""
    group = dist.group.WORLD
    assert group is not None
    return group


def all_gather(
    buckets: Sequence[Bucket],
    pack: Pack,
    donors: Sequence[Sequence[int]],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    pool: BufferPool,
    phase: Phase,
    seconds: float | None = None,
) -> Received:
    """Every rank of the group sees every network, bucket by bucket.

    Holds networks x bucket on `device`; the part that is sent lies inside the receive buffer.
    Every rank of the group must iterate to the end.

    Yields: (bucket, {donor: its elements}); the buffers are valid until the next step.
    """
    rank, networks = dist.get_rank(group), dist.get_world_size(group)
    for bucket, space in _spaces(buckets, networks, device, pool):
        parts = list(space.split(bucket.length))
        with phase("pack"):
            pack(parts[rank], bucket)
        with phase("exchange"), communicating():
            _gather_in_place(space, parts, rank, group, device, seconds)
        yield bucket, {donor: parts[donor] for donor in donors[rank]}


def put_together(
    cuts: Sequence[Sequence[Bucket]],
    pack: Pack,
    unpack: Pack,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    pool: BufferPool,
    phase: Phase,
    seconds: float | None = None,
) -> None:
    """Give every rank of the group the shares of all others, bucket by bucket.

    Holds ranks x bucket on `device`. Every rank of the group must call this.

    Args:
        cuts: the buckets of each rank's share, in the order of the ranks.
        pack: copies a bucket of this rank's share into memory.
        unpack: copies a bucket of another rank's out of memory.
        group: whose ranks hold the shares.
        device: where buffers must lie to travel.
        pool: of the buffers.
        phase: adds the time of a block to a named phase.
        seconds: after which a transfer over gloo is given up; None: the group's own time-out.
    """
    rank = dist.get_rank(group)
    for dtype in dict.fromkeys(bucket.dtype for cut in cuts for bucket in cut):
        of_type = [[bucket for bucket in cut if bucket.dtype == dtype] for cut in cuts]
        for buckets in zip_longest(*of_type):  # their lengths differ by an element at most
            longest = max(bucket.length for bucket in buckets if bucket)
            space = pool.take(0, len(cuts) * longest, dtype, device)
            parts = space.split(longest)
            with phase("pack"):
                if own := buckets[rank]:
                    pack(parts[rank][: own.length], own)
            with phase("exchange"), communicating():
                _gather_in_place(space, parts, rank, group, device, seconds)
            with phase("blend"):
                for other, bucket in enumerate(buckets):
                    if bucket and other != rank:
                        unpack(parts[other][: bucket.length], bucket)


def _gather_in_place(
    space: Tensor,
    parts: Sequence[Tensor],
    rank: int,
    group: dist.ProcessGroup,
    device: torch.device,
    seconds: float | None,
) -> None:
    if device.type == "cpu":  # gloo's own all-gather holds everything twice
        _to_everyone(parts, rank, group, seconds)
    else:
        dist.all_gather_single(space, parts[rank], group=group)


def _to_everyone(
    parts: Sequence[Tensor], rank: int, group: dist.ProcessGroup, seconds: float | None
) -> None:
    """Send this rank's part to all others, and receive theirs into place."""
    others = [peer for peer in range(len(parts)) if peer != rank]
    moves = [dist.P2POp(dist.isend, parts[rank], group=group, group_peer=peer) for peer in others]
    moves += [dist.P2POp(dist.irecv, parts[peer], group=group, group_peer=peer) for peer in others]
    for work in dist.batch_isend_irecv(moves) if moves else ():
        _finish(work, seconds)


def _finish(work: dist.Work, seconds: float | None) -> None:
    """Wait for one transfer; without a limit of its own the group's time-out holds."""
    work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))


def p2p(
    buckets: Sequence[Bucket],
    pack: Pack,
    donors: Sequence[Sequence[int]],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    pool: BufferPool,
    phase: Phase,
    seconds: float | None = None,
) -> Received:
    """Only the donors' weights travel, bucket by bucket.

    Holds IN_FLIGHT times a bucket to send and one for each donor on `device`. A bucket is packed
    while the one before it travels, so a bucket that was yielded may only change its own elements.
    Every rank of the group must iterate to the end.

    Yields: (bucket, {donor: its elements}); the buffers are valid until the next step.
    """
    rank = dist.get_rank(group)
    recipients = [network for network, givers in enumerate(donors) if rank in givers]
    under_way: deque[tuple[Bucket, Sequence[Tensor], list[dist.Work]]] = deque()

    def arrived() -> tuple[Bucket, dict[int, Tensor]]:
        bucket, parts, moves = under_way.popleft()
        with phase("exchange"), communicating():
            for move in moves:
                _finish(move, seconds if device.type == "cpu" else None)
        return bucket, dict(zip(donors[rank], parts, strict=True))

    for bucket, space in _spaces(buckets, 1 + len(donors[rank]), device, pool, slots=IN_FLIGHT):
        if len(under_way) == IN_FLIGHT:
            yield arrived()
        own, *parts = space.split(bucket.length)
        with phase("pack"):
            pack(own, bucket)
        with phase("exchange"), communicating():
            moves = [
                dist.P2POp(dist.isend, own, group=group, group_peer=peer) for peer in recipients
            ] + [
                dist.P2POp(dist.irecv, part, group=group, group_peer=peer)
                for peer, part in zip(donors[rank], parts, strict=True)
            ]
            under_way.append((bucket, parts, dist.batch_isend_irecv(moves) if moves else []))
    while under_way:
        yield arrived()


EXCHANGES = {"all_gather": all_gather, "p2p": p2p}


def bucket_limit(exchange: Exchange, bucket_bytes: int, *, on_host: bool) -> int:
    """Largest size of a bucket, in bytes, of an exchange that may take `bucket_bytes` for one.

    The buckets of `p2p` that are under way at once share the allowance.
    """
    if exchange == "p2p":
        bucket_bytes = max(1, bucket_bytes // IN_FLIGHT)
    return min(bucket_bytes, _HOST_BUCKET_BYTES) if on_host else bucket_bytes


def held_bytes(
    buckets: Sequence[Bucket],
    exchange: Exchange,
    *,
    networks: int,
    donors: int,
    on_host: bool,
    replicas: int = 1,
) -> int:
    """Most memory that an exchange holds for its buffers in one process, in bytes.

    Args:
        buckets: that travel.
        exchange: how.
        networks: of the group.
        donors: of this network.
        on_host: buffers in host memory are kept from one type of elements to the next; on a GPU
            they are given back.
        replicas: processes that put the network together afterwards.
    """
    parts, slots = (networks, 1) if exchange == "all_gather" else (1 + donors, IN_FLIGHT)
    each = []
    for dtype in dict.fromkeys(bucket.dtype for bucket in buckets):
        mine = [bucket.bytes for bucket in buckets if bucket.dtype == dtype]
        taken = [parts * max(mine)] * min(slots, len(mine))
        joining = replicas * max(mine) if replicas > 1 else 0
        if on_host:  # in the memory of the first slot
            taken[0] = max(taken[0], joining)
        each.append(max(sum(taken), joining))
    return sum(each) if on_host else max(each, default=0)


def _spaces(
    buckets: Sequence[Bucket], parts: int, device: torch.device, pool: BufferPool, *, slots: int = 1
) -> Iterator[tuple[Bucket, Tensor]]:
    """Each bucket with room for `parts` copies of it; the room is used again `slots` buckets on."""
    for dtype in dict.fromkeys(bucket.dtype for bucket in buckets):
        mine = [bucket for bucket in buckets if bucket.dtype == dtype]
        most = parts * max(bucket.length for bucket in mine)
        spaces = [pool.take(slot, most, dtype, device) for slot in range(min(slots, len(mine)))]
        for number, bucket in enumerate(mine):
            yield bucket, spaces[number % slots][: parts * bucket.length]
        del spaces
