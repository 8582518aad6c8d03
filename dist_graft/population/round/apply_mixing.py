"""Application of a Mixing: exchanges the weights it needs and blends them in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.grafting.memory_layout import flat, memory_order
from dist_graft.grafting.mixing import Mixing, ScalarSwap, blend_, blend_elementwise_
from dist_graft.grafting.units import GraftUnit
from dist_graft.population.collectives import gather_vectors
from dist_graft.population.round.buckets import Bucket, Piece, cut_buckets, pack_, unpack_
from dist_graft.population.round.exchange import (
    EXCHANGES,
    Transport,
    bucket_limit,
    gather_replica_parts,
)


@dataclass(frozen=True)
class Applied:
    """Measurements made while a Mixing was applied."""

    distance: list[float]
    """Distance to the donors before the round, per unit; empty if only scalars were exchanged."""
    bytes_received: int
    """Bytes of other networks' weights."""


def blend_tensors(
    tensors: Mapping[str, Tensor],
    units: Sequence[GraftUnit],
    mixing: Mixing,
    transport: Transport,
) -> Applied:
    """Exchange the donors' tensors and blend them in place, bucket by bucket.

    Every rank of the transport's groups must call this. Replicas each exchange and blend an equal
    part of the elements and then gather the other parts, so every element of a donor is received
    once for each network.

    Args:
        tensors: this network's tensors by state-dict key; changed in place.
        units: graft units of the common architecture.
        mixing: identical on every rank.
        transport: transport of the weights.
    """
    rank, replicas = dist.get_rank(transport.group), transport.replicas
    views = [flat(tensor.detach()) for tensor in tensors.values()]

    def pack(buffer: Tensor, bucket: Bucket) -> None:
        pack_(buffer, bucket, views)

    def unpack(buffer: Tensor, bucket: Bucket) -> None:
        unpack_(views, bucket, buffer)

    # Cut the tensors into buckets, the same for every network.
    index = {key: number for number, key in enumerate(tensors)}
    unit_of = {index[key]: number for number, unit in enumerate(units) for key in unit.tensors}
    on_host = transport.device.type == "cpu"
    shares = dist.get_world_size(replicas) if replicas else 1
    cuts = [
        cut_buckets(
            [view.numel() for view in views],
            [view.dtype for view in views],
            bucket_bytes=bucket_limit(transport.exchange, transport.bucket_bytes, on_host=on_host),
            share=share,
            shares=shares,
        )
        for share in range(shares)
    ]
    buckets = cuts[dist.get_rank(replicas) if replicas else 0] if mixing.networks > 1 else []

    # Exchange and blend.
    donors = mixing.donors[rank]
    senders = len(donors) if transport.exchange == "p2p" else mixing.networks - 1
    fractions = dict(zip(donors, mixing.fractions(rank), strict=True))
    by_element = _ElementFractions(mixing, rank, tensors)
    squares: list[list[Tensor]] = [[] for _ in units]
    exchange = EXCHANGES[transport.exchange]
    for bucket, parts in exchange(buckets, pack, mixing.donors, transport):
        for piece in bucket.pieces:
            unit = unit_of[piece.tensor]
            recipient = views[piece.tensor][piece.start : piece.start + piece.length]
            received = {
                donor: part[piece.offset : piece.offset + piece.length].to(recipient.device)
                for donor, part in parts.items()
            }
            with transport.phase("distance"):
                squares[unit].extend(
                    _squared_distance(recipient, part) for part in received.values()
                )
            with transport.phase("blend"):
                for donor, part in received.items():
                    fraction = by_element.of_piece(piece, donor, unit, units[unit])
                    if fraction is None:
                        blend_(recipient, part, fractions[donor][unit])
                    else:
                        blend_elementwise_(recipient, part, fraction)
    bytes_received = senders * sum(bucket.bytes for bucket in buckets)
    transport.wait_for_device()
    with transport.phase("distance"):
        sums = [sum(torch.stack(parts).tolist()) if parts else 0.0 for parts in squares]

    # Gather what the other replicas of this network blended.
    if replicas:
        with transport.phase("exchange"):
            local = torch.tensor([*sums, float(bytes_received)], dtype=torch.float64)
            gathered = gather_vectors(
                local,
                group=replicas,
                device=transport.device,
                seconds=transport.seconds,
                on_wait=transport.on_wait,
            )
            *sums, total_bytes = gathered.sum(dim=0).tolist()
            bytes_received = round(total_bytes)
        gather_replica_parts(cuts, pack, unpack, transport)
        transport.wait_for_device()
    return Applied([math.sqrt(total / max(1, len(donors))) for total in sums], bytes_received)


class _ElementFractions:
    """Interpolation weights by element, in memory order; keeps those of one tensor at a time."""

    def __init__(self, mixing: Mixing, network: int, tensors: Mapping[str, Tensor]) -> None:
        self._mixing = mixing
        self._network = network
        self._tensors = list(tensors.items())
        self._tensor = -1
        self._fractions: dict[int, Tensor | None] = {}

    def of_piece(self, piece: Piece, donor: int, index: int, unit: GraftUnit) -> Tensor | None:
        """Return the weights of one piece of a unit; None where the unit's fraction applies."""
        if piece.tensor != self._tensor:
            self._tensor, self._fractions = piece.tensor, {}
        if donor not in self._fractions:
            key, tensor = self._tensors[piece.tensor]
            fraction = self._mixing.tensor_fraction(
                self._network, donor, index, key, tensor.shape, buffer=key in unit.buffers
            )
            if fraction is not None:
                order = memory_order(tensor)
                fraction = fraction.expand(tensor.shape).permute(order).reshape(-1)
            self._fractions[donor] = fraction
        whole = self._fractions[donor]
        return None if whole is None else whole[piece.start : piece.start + piece.length]


def swap_scalars(
    tensors: Mapping[str, Tensor],
    units: Sequence[GraftUnit],
    mixing: ScalarSwap,
    transport: Transport,
) -> Applied:
    """Exchange the scalars that the mixing chooses and write them in place, dtype by dtype.

    Every rank of the transport's groups must call this. Replicas each exchange an equal part of the
    scalars and then gather the other parts.

    Args: as `blend_tensors`.
    """
    rank, replicas = dist.get_rank(transport.group), transport.replicas
    shares = dist.get_world_size(replicas) if replicas else 1
    share = dist.get_rank(replicas) if replicas else 0
    gather = partial(
        gather_vectors,
        device=transport.device,
        seconds=transport.seconds,
        on_wait=transport.on_wait,
    )
    bytes_received = 0
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        # Choose the scalars and cut them into equal parts for the replicas.
        with transport.phase("pack"):
            chosen = [
                (tensors[key].detach(), *mixing.chosen_scalars(number, key, tensors[key].numel()))
                for number, unit in enumerate(units)
                for key in unit.tensors
                if tensors[key].dtype == dtype and key not in unit.buffers
            ]
            values = [tensor.take(positions.to(tensor.device)) for tensor, positions, _ in chosen]
            local = torch.cat(values) if values else torch.empty(0, dtype=dtype)
        if mixing.networks == 1 or local.numel() == 0:
            continue
        length = math.ceil(len(local) / shares)
        padding = (0, shares * length - len(local))
        padded = torch.nn.functional.pad(local, padding)
        source = torch.cat([sources[:, rank] for _, _, sources in chosen])
        source = torch.nn.functional.pad(source, padding)
        part = slice(share * length, (share + 1) * length)

        # Exchange.
        with transport.phase("exchange"):
            gathered = gather(padded[part], group=transport.group)
            received = gathered[source[part], torch.arange(length)]
            if replicas:
                received = gather(received, group=replicas)
        bytes_received += (mixing.networks - 1) * local.numel() * local.element_size()

        # Write.
        with transport.phase("blend"):
            lengths = [len(positions) for _, positions, _ in chosen]
            news = received.flatten()[: len(local)].split(lengths)
            for (tensor, positions, _), new in zip(chosen, news, strict=True):
                target = tensor if tensor.dim() else tensor.view(1)
                index = torch.unravel_index(positions.to(tensor.device), target.shape)
                target[index] = new.to(tensor.device)  # put_ is not deterministic
    return Applied([], bytes_received)


def _squared_distance(one: Tensor, other: Tensor) -> Tensor:
    dtype = torch.promote_types(one.dtype, torch.float32)
    return torch.dist(one.to(dtype), other.to(dtype)).double().square()
