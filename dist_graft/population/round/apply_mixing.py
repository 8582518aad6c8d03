"""Application of a Mixing: exchanges the weights it needs and blends them in place."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.grafting.memory_layout import flat, memory_order, memory_positions
from dist_graft.grafting.mixing import Mixing, blend_, blend_elementwise_
from dist_graft.grafting.multi_tensor import multi_tensor
from dist_graft.grafting.units import GraftUnit
from dist_graft.population.collectives import gather_on_device, gather_vectors
from dist_graft.population.round.buckets import (
    Bucket,
    Piece,
    cut_buckets,
    cut_pieces,
    pack_,
    parts,
    slices,
    unpack_,
)
from dist_graft.population.round.exchange import (
    EXCHANGES,
    POPULATION,
    Transport,
    all_reduce_mean,
    bucket_limit,
    gather_replica_parts,
    header_device,
)

_GROUP = 1 << 17  # elements; fit in a core's cache between distance and blending


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

    # Exchange and blend: whole buckets at once on an accelerator, cache-sized groups on the CPU.
    donors = mixing.donors[rank]
    mean = mixing.mean_fractions() if transport.reduces_means else None
    if mean is None:
        sequence = mixing.sequence(rank)
        senders = len(donors) if transport.exchange == "p2p" else mixing.networks - 1
        bytes_received = senders * sum(bucket.bytes for bucket in buckets)
        received = EXCHANGES[transport.exchange](buckets, pack, mixing.donors, transport)
    else:
        sequence = [(POPULATION, mean)]
        bytes_received = sum(map(_reduced_bytes, buckets)) * 2 * (mixing.networks - 1)
        bytes_received //= mixing.networks
        received = all_reduce_mean(buckets, pack, transport)
    blends_own = any(source == rank for source, _ in sequence)
    by_element = _ElementFractions(mixing, rank, tensors)
    group_size = sys.maxsize if multi_tensor(views) else _GROUP
    squares: list[Tensor] = []
    square_units: list[int] = []
    for bucket, received_parts in received:
        device = views[bucket.pieces[0].tensor].device
        given = {
            donor: part.to(device, non_blocking=True) for donor, part in received_parts.items()
        }
        # The mean is in float32 or wider; distances are computed before it is rounded.
        rounded = {donor: part.to(bucket.dtype) for donor, part in given.items()}
        for pieces in cut_pieces(bucket.pieces, group_size) if given else ():
            numbers = [unit_of[piece.tensor] for piece in pieces]
            recipients = slices(pieces, views)
            with transport.phase("distance"):
                apart = [
                    _squared_distances(recipients, parts(pieces, part)) for part in given.values()
                ]
                squares.append(torch.stack(apart, dim=1).flatten())
                square_units += [number for number in numbers for _ in given]
            with transport.phase("blend"):
                elementwise = [
                    [
                        by_element.of_piece(piece, source, number, units[number])
                        for source, _ in sequence
                    ]
                    for piece, number in zip(pieces, numbers, strict=True)
                ]
                own = [each.clone() for each in recipients] if blends_own else []
                for column, (source, fractions) in enumerate(sequence):
                    others = own if source == rank else parts(pieces, rounded[source])
                    whole = [i for i, row in enumerate(elementwise) if row[column] is None]
                    blend_(
                        [recipients[i] for i in whole],
                        [others[i] for i in whole],
                        [fractions[numbers[i]] for i in whole],
                    )
                    for recipient, other, row in zip(recipients, others, elementwise, strict=True):
                        if (fraction := row[column]) is not None:
                            blend_elementwise_(recipient, other, fraction)
    transport.wait_for_device()
    with transport.phase("distance"):
        sums = [0.0] * len(units)
        values = torch.cat(squares).tolist() if squares else []  # the only read
        for number, square in zip(square_units, values, strict=True):
            sums[number] += square

    # From the distances to the mean: sum_j |x_k - x_j|^2 = K |x_k - m|^2 + sum_j |x_j - m|^2.
    if mean is not None:
        with transport.phase("exchange"):
            local = torch.tensor(sums, dtype=torch.float64)
            gathered = gather_vectors(
                local,
                group=transport.group,
                device=header_device(transport.group, transport.device),
                seconds=transport.seconds,
                on_wait=transport.on_wait,
            )
            sums = (mixing.networks * local + gathered.sum(dim=0)).tolist()

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
    mixing: Mixing,
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
        gather_on_device,
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
            chosen = [each for each in chosen if len(each[1])]
        if mixing.networks == 1 or not chosen:
            continue
        with transport.phase("pack"):
            scalars = (_PackedScalars if multi_tensor(tensors.values()) else _Scalars)(
                [tensor for tensor, _, _ in chosen],
                [positions for _, positions, _ in chosen],
                transport,
            )
            local = scalars.read()
            source = torch.cat([sources[:, rank] for _, _, sources in chosen])[scalars.order]
        length = math.ceil(len(local) / shares)
        padding = (0, shares * length - len(local))
        padded = torch.nn.functional.pad(local, padding)
        source = torch.nn.functional.pad(source, padding)
        part = slice(share * length, (share + 1) * length)

        # Exchange.
        with transport.phase("exchange"):
            gathered = gather(padded[part], group=transport.group)
            rows = source[part][None].to(transport.device, non_blocking=True)
            received = gathered.gather(0, rows)[0]
            if replicas:
                received = gather(received, group=replicas)
        bytes_received += (mixing.networks - 1) * local.numel() * local.element_size()

        # Write.
        with transport.phase("blend"):
            scalars.write(received.flatten()[: len(local)])
    transport.wait_for_device()
    return Applied([], bytes_received)


class _Scalars:
    """Chosen scalars of tensors of one dtype, read and written tensor by tensor.

    Args:
        tensors: the tensors, not copied.
        positions: int64, positions in each tensor's logical order, on the CPU; not empty.
        transport: size of the buckets.
    """

    def __init__(
        self, tensors: Sequence[Tensor], positions: Sequence[Tensor], transport: Transport
    ) -> None:
        del transport
        self._tensors = tensors
        self._positions = positions
        self.order: slice | Tensor = slice(None)
        """Order of the scalars, as an index into the concatenated positions."""

    def read(self) -> Tensor:
        """Return the scalars, [n]."""
        pairs = zip(self._tensors, self._positions, strict=True)
        return torch.cat([tensor.take(each.to(tensor.device)) for tensor, each in pairs])

    def write(self, values: Tensor) -> None:
        """Replace the scalars by values [n]."""
        parts_ = values.split([len(each) for each in self._positions])
        for tensor, positions, part in zip(self._tensors, self._positions, parts_, strict=True):
            target = tensor if tensor.dim() else tensor.view(1)
            index = torch.unravel_index(positions.to(tensor.device), target.shape)
            target[index] = part.to(tensor.device)  # put_ is not deterministic


class _PackedScalars(_Scalars):
    """Chosen scalars, read and written through packed buckets, in few operations.

    The scalars are in the memory order of the tensors. Holds one bucket at a time.
    """

    def __init__(
        self, tensors: Sequence[Tensor], positions: Sequence[Tensor], transport: Transport
    ) -> None:
        self._views = [flat(tensor) for tensor in tensors]
        sizes = [len(view) for view in self._views]
        before = itertools.accumulate(sizes, initial=0)
        where = torch.cat(
            [
                memory_positions(tensor, each) + start
                for tensor, each, start in zip(tensors, positions, before, strict=False)
            ]
        )
        where, self.order = where.sort()
        self._buckets = cut_buckets(
            sizes, [tensors[0].dtype] * len(sizes), bucket_bytes=transport.bucket_bytes
        )
        starts = list(itertools.accumulate((b.length for b in self._buckets), initial=0))
        edges = torch.searchsorted(where, torch.tensor(starts))
        self._counts = edges.diff().tolist()
        start_of = torch.tensor(starts[:-1]).repeat_interleave(edges.diff())
        self._where = (where - start_of).to(tensors[0].device, non_blocking=True)

    def _packed(self) -> Iterator[tuple[Bucket, Tensor, Tensor]]:
        """Yield (bucket, its elements, positions of its scalars) for buckets with scalars."""
        pairs = zip(self._buckets, self._where.split(self._counts), strict=True)
        for bucket, where in pairs:
            if len(where):
                view = self._views[0]
                buffer = torch.empty(bucket.length, dtype=view.dtype, device=view.device)
                pack_(buffer, bucket, self._views)
                yield bucket, buffer, where

    def read(self) -> Tensor:
        """Return the scalars, [n]."""
        return torch.cat([buffer.index_select(0, where) for _, buffer, where in self._packed()])

    def write(self, values: Tensor) -> None:
        """Replace the scalars by values [n]."""
        values = values.to(self._views[0].device)
        counts = [count for count in self._counts if count]
        packed = zip(self._packed(), values.split(counts), strict=True)
        for (bucket, buffer, where), part in packed:
            buffer.index_copy_(0, where, part)
            unpack_(self._views, bucket, buffer)


def _squared_distances(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    """Squared Euclidean distance of each pair, in at least float32: float64 [pairs]."""
    dtype = torch.promote_types(ones[0].dtype, torch.float32)
    differences = torch._foreach_sub(_widened(ones, dtype), _widened(others, dtype))
    return torch.stack(torch._foreach_norm(differences)).double().square()


def _widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].dtype == dtype:
        return tensors
    lengths = [len(tensor) for tensor in tensors]
    wide = torch.empty(sum(lengths), dtype=dtype, device=tensors[0].device)
    copies = list(wide.split(lengths))
    torch._foreach_copy_(copies, tensors)
    return copies


def _reduced_bytes(bucket: Bucket) -> int:
    """Size of a bucket in the dtype of its all-reduce."""
    return bucket.length * torch.promote_types(bucket.dtype, torch.float32).itemsize
