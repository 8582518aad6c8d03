"""Before anything large moves, every process learns whether all hold the same and may go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_graft.errors import (
    DisagreementError,
    NonFiniteError,
    RoundPostponedError,
    RoundStoppedError,
)
from dist_graft.grafting.memory_layout import memory_order

PROTOCOL = 3
SOUND = -1
LOSS = -2
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
    diverged: int
    """Index of the first tensor that is not finite; LOSS when it is the loss; else SOUND."""
    units: int
    measured: int
    """Numbers that the network will tell the others; -1 when it has none to tell."""
    rate: int
    """What the donors' shares are multiplied with, in units of 1 / RATE_UNIT."""
    stop: int
    """1 when this network wants to stop before the round."""
    saves: int
    """Checkpoint sets at which the network took part on request."""


def of_one_network(headers: Sequence[Header]) -> Header:
    """What a network says whose processes said this: one that stops or diverged, so do all.

    Raises: DisagreementError when they do not hold the same network.
    """
    first = headers[0]
    for name in ("protocol", "network", "round", "digest", "units", "rate", "saves"):
        values = [getattr(header, name) for header in headers]
        if len(set(values)) > 1:
            raise DisagreementError(
                f"the processes of network {first.network} differ in {name} ({values}): each must "
                "hold the same network and call graft() as often"
            )
    lost = [header.diverged for header in headers if header.diverged != SOUND]
    return replace(
        first,
        diverged=lost[0] if lost else SOUND,
        measured=max(header.measured for header in headers),
        stop=max(header.stop for header in headers),
    )


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


@dataclass(frozen=True)
class Agreement:
    """What all networks know once they agree to go on."""

    diverged: dict[int, str]
    """What is not finite, by network."""
    measured: int
    """Numbers that each network tells."""


def agree(
    header: Header,
    schema: Schema,
    keys: Sequence[str],
    *,
    gather: Callable[[Tensor], Tensor],
    tolerant: bool,
) -> Agreement:
    """Compare all networks' headers; every rank of the group must call this.

    All ranks see the same headers, so all return or all raise.

    Args:
        header: of this network.
        schema: of this network.
        keys: of the tensors, in order.
        gather: everyone's vectors of one length, [n] -> [networks, n].
        tolerant: go on without the networks that diverged, while there are others.

    Raises: RoundStoppedError naming the networks that want to stop; RoundPostponedError when some
        took part in fewer requested checkpoint sets; DisagreementError naming the ranks and the
        first difference; NonFiniteError naming the networks that diverged and their
        first tensor that is not finite.
    """
    everyone = gather(torch.tensor(astuple(header), dtype=torch.int64))
    headers = [Header(*row) for row in everyone.tolist()]

    for name in ("protocol", "stop", "saves", "round", "digest", "units", "rate"):
        if name == "stop" and (stopping := [other.network for other in headers if other.stop]):
            who = ", ".join(map(str, stopping))
            raise RoundStoppedError(f"network {who} stops before round {header.round}")
        values = [getattr(other, name) for other in headers]
        if len(set(values)) == 1:
            continue
        if name == "saves":
            raise RoundPostponedError(max(values))
        if name in ("digest", "units"):
            schemas = _gather_bytes(schema.json, [other.schema_bytes for other in headers], gather)
            raise DisagreementError(_first_difference([json.loads(text) for text in schemas]))
        rank = next(rank for rank, value in enumerate(values) if value != values[0])
        if name == "rate":
            values = [value / RATE_UNIT for value in values]
        raise DisagreementError(
            f"rank 0 is in {name} {values[0]} and rank {rank} in {name} {values[rank]}: every rank "
            "must run the same program and call graft() as often"
        )

    diverged = {
        other.network: f"a weight that is not finite in {keys[other.diverged]}"
        if other.diverged >= 0
        else "a training loss or gradient that is not finite"
        for other in headers
        if other.diverged != SOUND
    }
    if diverged and not (tolerant and len(diverged) < len(headers)):
        raise NonFiniteError(
            "; ".join(f"network {network} has {what}" for network, what in diverged.items())
            + f" (round {header.round}): a lower learning rate, warm-up or clipping may help"
        )
    return Agreement(diverged, max(other.measured for other in headers))


def _gather_bytes(
    data: bytes, lengths: list[int], gather: Callable[[Tensor], Tensor]
) -> list[bytes]:
    padded = torch.frombuffer(bytearray(data.ljust(max(lengths), b" ")), dtype=torch.uint8)
    return [
        bytes(row[:length].tolist()) for row, length in zip(gather(padded), lengths, strict=True)
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
