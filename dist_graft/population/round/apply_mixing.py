"""Carries a Mixing out: moves what must travel, and blends it into this network in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.grafting.memory_layout import flat, memory_order
from dist_graft.grafting.mixing import Mixing, blend_, blend_finely_
from dist_graft.grafting.rules.wash import Shuffle
from dist_graft.grafting.units import GraftUnit
from dist_graft.population.collectives import gather_vectors
from dist_graft.population.round.buckets import Bucket, Piece, cut_buckets, pack_, unpack_
from dist_graft.population.round.exchange import (
    EXCHANGES,
    BufferPool,
    Exchange,
    Phase,
    bucket_limit,
    put_together,
)


@dataclass(frozen=True)
class Applied:
    """What carrying out a Mixing took."""

    distance: list[float]
    """Per unit, to the donors before the round; empty where single scalars travelled."""
    bytes_received: int
    """Weights of other networks."""


def apply_mixing(
    tensors: Mapping[str, Tensor],
    units: Sequence[GraftUnit],
    mixing: Mixing,
    *,
    exchange: Exchange,
    bucket_bytes: int,
    group: dist.ProcessGroup,
    device: torch.device,
    pool: BufferPool,
    phase: Phase,
    seconds: float | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> Applied:
    """Change this rank's tensors as the mixing says; every rank of the group must call this.

    Where several processes hold this network, each blends an equal share of its elements, and then
    they give each other theirs: every element of a donor comes to the network once.

    Args:
        tensors: of this network, by key; changed in place.
        units: of the common architecture.
        mixing: the same on every rank.
        exchange: how whole tensors travel.
        bucket_bytes: size of one network's part of a buffer.
        group: whose ranks are the networks.
        device: where buffers must lie to travel.
        pool: of the buffers.
        phase: adds the time of a block to a named phase.
        seconds: after which a transfer over gloo is given up; None: the group's own time-out.
        replicas: the processes that hold this network, in order; None: this one alone.
    """
    if isinstance(mixing, Shuffle):
        return _swap_scalars(
            *(tensors, units, mixing),
            group=group,
            device=device,
            phase=phase,
            seconds=seconds,
            replicas=replicas,
        )
    rank = dist.get_rank(group)
    index = {key: number for number, key in enumerate(tensors)}
    unit_of = {index[key]: number for number, unit in enumerate(units) for key in unit.tensors}
    views = [flat(tensor.detach()) for tensor in tensors.values()]
    donors = mixing.donors[rank]
    fractions = dict(zip(donors, mixing.fractions(rank), strict=True))
    fine = _FineFractions(mixing, rank, tensors, units)
    shares = dist.get_world_size(replicas) if replicas else 1
    cuts = [
        cut_buckets(
            [view.numel() for view in views],
            [view.dtype for view in views],
            bucket_bytes=bucket_limit(exchange, bucket_bytes, on_host=device.type == "cpu"),
            share=share,
            shares=shares,
        )
        for share in range(shares)
    ]
    buckets = cuts[dist.get_rank(replicas) if replicas else 0]

    def pack(buffer: Tensor, bucket: Bucket) -> None:
        pack_(buffer, bucket, views)

    squares: list[list[Tensor]] = [[] for _ in units]
    received = 0
    for bucket, parts in EXCHANGES[exchange](
        buckets if mixing.networks > 1 else [],
        pack,
        mixing.donors,
        group=group,
        device=device,
        pool=pool,
        phase=phase,
        seconds=seconds,
    ):
        received += (len(parts) if exchange == "p2p" else mixing.networks - 1) * bucket.bytes
        for piece in bucket.pieces:
            unit = unit_of[piece.tensor]
            own = views[piece.tensor][piece.start : piece.start + piece.length]
            theirs = {
                donor: part[piece.offset : piece.offset + piece.length].to(own.device)
                for donor, part in parts.items()
            }
            with phase("distance"):
                squares[unit].extend(_squared_distance(own, part) for part in theirs.values())
            with phase("blend"):
                for donor, part in theirs.items():
                    fraction = fine.of(piece, donor)
                    if fraction is None:
                        blend_(own, part, fractions[donor][unit])
                    else:
                        blend_finely_(own, part, fraction)
    with phase("distance"):
        sums = [sum(torch.stack(parts).tolist()) if parts else 0.0 for parts in squares]
    if replicas:
        with phase("exchange"):
            *sums, total = _sum_over(replicas, [*sums, float(received)], device, seconds)
            received = round(total)
        put_together(
            cuts,
            pack,
            lambda buffer, bucket: unpack_(views, bucket, buffer),
            group=replicas,
            device=device,
            pool=pool,
            phase=phase,
            seconds=seconds,
        )
    return Applied([math.sqrt(total / max(1, len(donors))) for total in sums], received)


def _sum_over(
    group: dist.ProcessGroup, values: list[float], device: torch.device, seconds: float | None
) -> list[float]:
    rows = gather_vectors(
        torch.tensor(values, dtype=torch.float64), group=group, device=device, seconds=seconds
    )
    return [float(value) for value in rows.sum(dim=0)]


class _FineFractions:
    """Fractions that differ inside a tensor, in memory order, for one tensor at a time."""

    def __init__(
        self,
        mixing: Mixing,
        network: int,
        tensors: Mapping[str, Tensor],
        units: Sequence[GraftUnit],
    ) -> None:
        self._mixing = mixing
        self._network = network
        self._tensors = list(tensors.items())
        self._unit_of = {key: number for number, unit in enumerate(units) for key in unit.tensors}
        self._buffers = frozenset[str]().union(*(unit.buffers for unit in units))
        self._tensor = -1
        self._fractions: dict[int, Tensor | None] = {}

    def of(self, piece: Piece, donor: int) -> Tensor | None:
        """The fractions of one piece; None where the unit's holds."""
        if piece.tensor != self._tensor:
            self._tensor, self._fractions = piece.tensor, {}
        if donor not in self._fractions:
            key, tensor = self._tensors[piece.tensor]
            fraction = self._mixing.tensor_fraction(
                self._network,
                donor,
                self._unit_of[key],
                key,
                tensor.shape,
                buffer=key in self._buffers,
            )
            if fraction is not None:
                order = memory_order(tensor)
                fraction = fraction.expand(tensor.shape).permute(order).reshape(-1)
            self._fractions[donor] = fraction
        whole = self._fractions[donor]
        return None if whole is None else whole[piece.start : piece.start + piece.length]


def _swap_scalars(
    tensors: Mapping[str, Tensor],
    units: Sequence[GraftUnit],
    mixing: Shuffle,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    phase: Phase,
    seconds: float | None,
    replicas: dist.ProcessGroup | None,
) -> Applied:
    """Only the chosen scalars travel, type by type: every rank chooses the same ones."""
    rank = dist.get_rank(group)
    shares = dist.get_world_size(replicas) if replicas else 1
    share = dist.get_rank(replicas) if replicas else 0
    received = 0
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        with phase("pack"):
            moving = [
                (tensors[key].detach(), *mixing.chosen(number, key, tensors[key].numel()))
                for number, unit in enumerate(units)
                for key in unit.tensors
                if tensors[key].dtype == dtype and key not in unit.buffers
            ]
            taken_from = [tensor.take(where.to(tensor.device)) for tensor, where, _ in moving]
            mine = torch.cat(taken_from) if taken_from else torch.empty(0, dtype=dtype)
        if mixing.networks == 1 or mine.numel() == 0:
            continue
        length = -(-len(mine) // shares)  # the last share is filled up
        padded = torch.nn.functional.pad(mine, (0, shares * length - len(mine)))
        source = torch.cat([sources[:, rank] for _, _, sources in moving])
        source = torch.nn.functional.pad(source, (0, len(padded) - len(mine)))
        part = slice(share * length, (share + 1) * length)
        with phase("exchange"):
            everyone = gather_vectors(padded[part], group=group, device=device, seconds=seconds)
            taken = everyone[source[part], torch.arange(length)]
            if replicas:
                taken = gather_vectors(taken, group=replicas, device=device, seconds=seconds)
        received += (mixing.networks - 1) * mine.numel() * mine.element_size()
        with phase("blend"):
            values = taken.flatten()[: len(mine)].split([len(where) for _, where, _ in moving])
            for (tensor, where, _), new in zip(moving, values, strict=True):
                whole = tensor if tensor.dim() else tensor.view(1)
                places = torch.unravel_index(where.to(tensor.device), whole.shape)
                whole[places] = new.to(tensor.device)  # put_ has no deterministic form
    return Applied([], received)


def _squared_distance(own: Tensor, other: Tensor) -> Tensor:
    kind = torch.promote_types(own.dtype, torch.float32)
    return torch.dist(own.to(kind), other.to(kind)).double().square()
