"""Before anything large moves, every process learns whether all hold the same and may go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.errors import DisagreementError, NonFiniteError, RoundStoppedError
from dist_graft.grafting.layout import memory_order
from dist_graft.population.wire import on_the_wire

PROTOCOL = 2
ALL_FINITE = -1
RATE_UNIT = 2**53


@dataclass(frozen=True)
class Header:
    """What each network says first; the same size for every model."""

    protocol: int
    network: int
    round: int
    digest: int
    """Of the schema, 63 bits."""
    schema_bytes: int
    not_finite: int
    """Index of the first tensor that is not finite, or ALL_FINITE."""
    units: int
    rate: int
    """What the donors' shares are multiplied with, in units of 1 / RATE_UNIT."""
    stop: int
    """1 when this network wants to stop before the round."""


class Schema:
    """What all networks must have in common, as JSON and as a digest.

    Args:
        tensors: by key, in order.
        units: name of each graft unit, in order.
        options: whatever else must agree, by name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], units: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        description = {
            "options": dict(options),
            "tensors": [
                f"{key} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
                f"in memory order {_visible_order(tensor)}"
                for key, tensor in tensors.items()
            ],
            "units": list(units),
        }
        self.json = json.dumps(description, sort_keys=True, default=str).encode()
        self.digest = int.from_bytes(hashlib.blake2b(self.json, digest_size=8).digest(), "big") >> 1


def _visible_order(tensor: Tensor) -> list[int]:
    return [dim for dim in memory_order(tensor) if tensor.shape[dim] != 1]


def agree(
    header: Header,
    schema: Schema,
    keys: Sequence[str],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Compare all networks' headers; every rank of the group must call this.

    All ranks see the same headers, so all return or all raise.

    Raises: RoundStoppedError naming the networks that want to stop; DisagreementError naming the
        ranks and the first difference; NonFiniteError naming the networks and their first tensor
        that is not finite.
    """
    mine = torch.tensor(astuple(header), dtype=torch.int64)
    everyone = gather_vectors(mine, group=group, device=device)
    headers = [Header(*row) for row in everyone.tolist()]

    for name in ("protocol", "stop", "round", "digest", "units", "rate"):
        if name == "stop" and (stopping := [other.network for other in headers if other.stop]):
            who = ", ".join(map(str, stopping))
            raise RoundStoppedError(f"network {who} stops before round {header.round}")
        values = [getattr(other, name) for other in headers]
        if len(set(values)) == 1:
            continue
        if name in ("digest", "units"):
            schemas = _gather_bytes(
                schema.json, [other.schema_bytes for other in headers], group=group, device=device
            )
            raise DisagreementError(_first_difference([json.loads(text) for text in schemas]))
        rank = next(rank for rank, value in enumerate(values) if value != values[0])
        if name == "rate":
            values = [value / RATE_UNIT for value in values]
        raise DisagreementError(
            f"rank 0 is in {name} {values[0]} and rank {rank} in {name} {values[rank]}: every rank "
            "must run the same program and call graft() as often"
        )

    bad = [other for other in headers if other.not_finite != ALL_FINITE]
    if bad:
        raise NonFiniteError(
            "; ".join(
                f"network {other.network} has a weight that is not finite in "
                f"{keys[other.not_finite]}"
                for other in bad
            )
            + f" (round {header.round}): a lower learning rate, warm-up or clipping may help"
        )


def gather_vectors(vector: Tensor, *, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """All networks' vectors of one agreed length: [n] -> [networks, n], on the CPU.

    Every rank of the group must call this.
    """
    mine = vector.to(device)
    networks = dist.get_world_size(group)
    everyone = mine.new_empty(networks * mine.numel())
    with on_the_wire():
        dist.all_gather_single(everyone, mine, group=group)
    return everyone.cpu().view(networks, -1)


def _gather_bytes(
    data: bytes, lengths: list[int], *, group: dist.ProcessGroup, device: torch.device
) -> list[bytes]:
    padded = torch.frombuffer(bytearray(data.ljust(max(lengths), b" ")), dtype=torch.uint8)
    return [
        bytes(row[:length].tolist())
        for row, length in zip(
            gather_vectors(padded, group=group, device=device), lengths, strict=True
        )
    ]


def _first_difference(schemas: list[dict[str, Any]]) -> str:
    rank = next(rank for rank, schema in enumerate(schemas) if schema != schemas[0])
    first, other = schemas[0], schemas[rank]
    who = f"networks 0 and {rank} (ranks 0 and {rank})"
    for name in sorted({*first["options"], *other["options"]}):
        ours, theirs = first["options"].get(name), other["options"].get(name)
        if ours != theirs:
            return (
                f"{who} do not graft alike: {name} is {ours} in network 0 and {theirs} in network "
                f"{rank}; give every rank the same options"
            )
    for what in ("tensors", "units"):
        for index in range(max(len(first[what]), len(other[what]))):
            ours, theirs = (
                schema[what][index] if index < len(schema[what]) else "missing"
                for schema in (first, other)
            )
            if ours != theirs:
                return (
                    f"{who} differ in architecture: of the {what} number {index} is {ours} in "
                    f"network 0 and {theirs} in network {rank}; give every rank the same model"
                )
    return f"{who} differ"
