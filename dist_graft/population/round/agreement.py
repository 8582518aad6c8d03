"""Agreement before a round: all ranks check that they hold the same model and may proceed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_graft.errors import DisagreementError, NonFiniteError, RoundStoppedError
from dist_graft.grafting.information import first_not_finite
from dist_graft.grafting.memory_layout import memory_order
from dist_graft.grafting.rules.base import Rule
from dist_graft.population.collectives import Gather, gather_bytes

MESSAGE_FORMAT = 5
FINITE = -1
"""Header.diverged of a network whose weights and loss are finite."""
LOSS_NOT_FINITE = -2
"""Header.diverged of a network whose weights are finite, but not its loss."""
RATE_SCALE = 2**53


@dataclass(frozen=True)
class Header:
    """First message of a network in a round; its size does not depend on the model."""

    protocol: int
    network: int
    round: int
    digest: int
    """Digest of the schema, 63 bits."""
    schema_bytes: int
    """Length of the schema's JSON."""
    diverged: int
    """Index of the first tensor that is not finite, LOSS_NOT_FINITE, or FINITE."""
    measured: int
    """Length of the network's information; -1 if it has none."""
    rate: int
    """Factor for the donors' shares, in units of 1 / RATE_SCALE."""
    stop: int
    """1 if the network wants to stop before the round."""

    def to_tensor(self) -> Tensor:
        """Return the fields as int64 [fields]."""
        return torch.tensor(astuple(self), dtype=torch.int64)


def merge_replica_headers(rows: Tensor) -> Header:
    """Merge the headers of one network's replicas: if one stops or diverged, the network does.

    Args:
        rows: headers, int64 [replicas, fields].

    Raises: DisagreementError if the replicas do not hold the same network.
    """
    headers = [Header(*row) for row in rows.tolist()]
    first = headers[0]
    for name in ("protocol", "network", "round", "digest", "rate"):
        values = [getattr(header, name) for header in headers]
        if len(set(values)) > 1:
            raise DisagreementError(
                f"the replicas of network {first.network} differ in {name} ({values}): every "
                "replica must hold the same network and call graft() equally often"
            )
    diverged = [header.diverged for header in headers if header.diverged != FINITE]
    return replace(
        first,
        diverged=diverged[0] if diverged else FINITE,
        measured=max(header.measured for header in headers),
        stop=max(header.stop for header in headers),
    )


class Schema:
    """Tensors, units and options that all networks must have in common, as JSON and as a digest.

    Args:
        tensors: the model's tensors by state-dict key, in order.
        units: name of each graft unit, in order.
        options: options that must agree, by name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], units: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        description = {
            "options": dict(options),
            "tensors": [
                f"{key} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
                f"in memory order {[dim for dim in memory_order(tensor) if tensor.shape[dim] != 1]}"
                for key, tensor in tensors.items()
            ],
            "units": list(units),
        }
        self.json = json.dumps(description, sort_keys=True, default=str).encode()
        self.digest = int.from_bytes(hashlib.blake2b(self.json, digest_size=8).digest(), "big") >> 1


def rule_options(rule: Rule) -> dict[str, Any]:
    """Name and fields of a rule, which must agree between the networks."""
    kind = type(rule)
    fields = getattr(kind, "__dataclass_fields__", {})
    return {name: getattr(rule, name) for name in fields} | {"rule": kind.__qualname__}


@dataclass(frozen=True)
class Agreement:
    """Properties of the networks that agreed to proceed; identical on every rank."""

    diverged: dict[int, str]
    """Description of what is not finite, by network."""
    measured: int
    """Length of each network's information."""


def agree(
    header: Header, schema: Schema, keys: Sequence[str], *, gather: Gather, tolerant: bool
) -> Agreement:
    """Compare the headers of all networks; every rank of the group must call this.

    All ranks receive the same headers, so either all return or all raise.

    Args:
        header: header of this network.
        schema: schema of this network; gathered only if the digests differ.
        keys: state-dict keys of the tensors, in order.
        gather: collective over the networks.
        tolerant: whether to proceed without diverged networks as long as one is finite.

    Raises: RoundStoppedError naming the networks that want to stop; DisagreementError naming the
        ranks and their first difference; NonFiniteError naming the diverged networks and their
        first tensor that is not finite.
    """
    headers = [Header(*row) for row in gather(header.to_tensor()).tolist()]

    for name in ("protocol", "stop", "round", "digest", "rate"):
        if name == "stop" and (stopping := [other.network for other in headers if other.stop]):
            names = ", ".join(map(str, stopping))
            raise RoundStoppedError(f"network {names} stops before round {header.round}")
        values = [getattr(other, name) for other in headers]
        if len(set(values)) == 1:
            continue
        if name == "digest":
            lengths = [other.schema_bytes for other in headers]
            schemas = gather_bytes(schema.json, gather, lengths=lengths)
            raise DisagreementError(_first_difference([json.loads(text) for text in schemas]))
        rank = next(rank for rank, value in enumerate(values) if value != values[0])
        if name == "rate":
            values = [value / RATE_SCALE for value in values]
        raise DisagreementError(
            f"rank 0 is in {name} {values[0]} and rank {rank} in {name} {values[rank]}: every rank "
            "must run the same program and call graft() equally often"
        )

    diverged = {
        other.network: describe_divergence(other.diverged, keys)
        for other in headers
        if other.diverged != FINITE
    }
    if diverged and not (tolerant and len(diverged) < len(headers)):
        raise NonFiniteError.of_networks(diverged, header.round)
    return Agreement(diverged, max(other.measured for other in headers))


def finite_state(tensors: Mapping[str, Tensor], diverged: bool) -> int:
    """Return the index of the first tensor that is not finite, LOSS_NOT_FINITE, or FINITE.

    `diverged`: whether the training loss is not finite.
    """
    first = first_not_finite(list(tensors.values()))
    return (LOSS_NOT_FINITE if diverged else FINITE) if first is None else first


def describe_divergence(state: int, keys: Sequence[str]) -> str:
    """Return what is not finite, from `finite_state` and the keys of the tensors in order."""
    if state >= 0:
        return f"a weight that is not finite in {keys[state]}"
    return "" if state == FINITE else "a training loss or gradient that is not finite"


def _first_difference(schemas: list[dict[str, Any]]) -> str:
    rank = next(rank for rank, schema in enumerate(schemas) if schema != schemas[0])
    first, other = schemas[0], schemas[rank]
    networks = f"networks 0 and {rank} (ranks 0 and {rank})"
    for name in sorted({*first["options"], *other["options"]}):
        one, two = first["options"].get(name), other["options"].get(name)
        if one != two:
            return (
                f"{networks} have different options: {name} is {one} in network 0 and {two} in "
                f"network {rank}; give every rank the same options"
            )
    for what in ("tensors", "units"):
        for index in range(max(len(first[what]), len(other[what]))):
            one, two = (
                schema[what][index] if index < len(schema[what]) else "missing"
                for schema in (first, other)
            )
            if one != two:
                return (
                    f"{networks} have different models: {what} number {index} is {one} in network "
                    f"0 and {two} in network {rank}; give every rank the same model"
                )
    return f"{networks} differ"
