"""One round after another: agree, decide, exchange, apply, record."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_graft.errors import PeerError
from dist_graft.grafting.criteria import is_finite
from dist_graft.grafting.layout import flat
from dist_graft.grafting.mixing import Mixing, blend_
from dist_graft.grafting.rules import Ring, Rule
from dist_graft.grafting.topology import ring
from dist_graft.grafting.units import GraftUnit, Lead, graft_tensors, graft_units
from dist_graft.population.agreement import (
    ALL_FINITE,
    PROTOCOL,
    Header,
    Schema,
    agree,
    gather_vectors,
)
from dist_graft.population.buckets import Bucket, cut_buckets, pack_
from dist_graft.population.exchange import EXCHANGES, Exchange, communication_device, world
from dist_graft.population.phases import PhaseClock
from dist_graft.population.presence import RollCall


@dataclasses.dataclass(frozen=True)
class GraftRecord:
    """What one round did to this network; dictionaries are by graft unit name."""

    round: int
    """Number of the round, from 0."""
    donor: int
    """Index in the group of the network whose weights were mixed in; the first of several."""
    coefficient: dict[str, float]
    """Share that the network kept of itself."""
    information: dict[str, float]
    """Of this network before the round, in the criterion's unit (nats for entropy)."""
    distance: dict[str, float]
    """Euclidean distance to the donor (root mean square over several) before the round, over all
    tensors of the unit."""
    seconds: float
    """Of the whole round, waiting for the others included."""
    phase_seconds: dict[str, float]
    """Of measure (finite check, information), agree (with the waiting), pack, exchange, distance
    and blend."""
    bytes_received: int
    """Weights received from other networks."""


class Grafter:
    """Grafts the networks of a process group into each other, one network a process.

    Build one in every process after `init_process_group`; building communicates nothing. The
    keywords from amplitude to criterion are shorthand for `rule=Ring(...)`.

    Args:
        model: any module: plain, compiled, or wrapped for data-parallel training.
        amplitude: A of eq. 7 in arXiv 2001.05868, in [0, 1].
        sensitivity: c of eq. 7, per unit of information, at least 0.
        num_bins: of the entropy's histogram.
        criterion: "entropy" (eq. 6), "filter_entropy" (eq. 5) or "l1".
        lead: "conv", or "conv+linear" for MLPs and transformers.
        exchange: "all_gather": every rank receives every network, or "p2p": the donor's only.
            Both give the same bits.
        bucket_mb: size of one network's part of a buffer, in MiB; all_gather holds networks x
            bucket, p2p two buckets (on the ring).
        rule: what flows where, instead of the ring.
        group: whose ranks are the networks; None: the default group.
        roll_call: lets errors name the network that is missing.

    Raises: ValueError for an option out of range or a model that cannot be grafted (see
        `graft_units`; sharded parameters are refused by name); RuntimeError before
        `init_process_group`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        amplitude: float = 0.4,
        sensitivity: float = 5.0,
        num_bins: int = 10,
        criterion: str = "entropy",
        lead: Lead = "conv",
        exchange: Exchange = "all_gather",
        bucket_mb: float = 32,
        rule: Rule | None = None,
        group: dist.ProcessGroup | None = None,
        roll_call: RollCall | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "Grafter needs a process group: call torch.distributed.init_process_group first"
            )
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if not (bucket_mb > 0 and math.isfinite(bucket_mb)):
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb!r}")
        self._module = _unwrap(model)
        self._units = graft_units(self._module, lead=lead)
        self._lead = lead
        self._exchange: Exchange = exchange
        self._bucket_bytes = max(1, int(bucket_mb * 2**20))
        self._rule = rule or Ring(
            amplitude=amplitude, sensitivity=sensitivity, num_bins=num_bins, criterion=criterion
        )
        self._group = group or world()
        self._roll_call = roll_call
        self._round = 0

    @property
    def units(self) -> list[GraftUnit]:
        """The graft units, in the order of the records."""
        return self._units

    @property
    def round(self) -> int:
        """Number of the next round; set it when a run is resumed."""
        return self._round

    @round.setter
    def round(self, value: int) -> None:
        self._round = value

    def graft(self) -> GraftRecord:
        """One round: every rank of the group must call this, equally often.

        Changes the model's floating parameters and buffers in place; integer buffers stay.

        Raises (on every rank alike): DisagreementError when the models or options differ,
            NonFiniteError when a weight of any network is not finite; PeerError when another
            process died or did not answer. In the first two cases no weight was changed.
        """
        rank = dist.get_rank(self._group)
        tensors = graft_tensors(self._module)
        keys = list(tensors)
        home = next(iter(tensors.values())).device
        device = communication_device(self._group, home)
        clock = PhaseClock(home)

        with clock.phase("measure"):
            bad = next((i for i, key in enumerate(keys) if not is_finite(tensors[key])), ALL_FINITE)
            information = self._measure(tensors) if bad == ALL_FINITE else None
        with clock.phase("agree"), self._peers(self._round):
            self._arrive(self._round)
            self._agree(tensors, bad, device)
            assert information is not None
            matrix = gather_vectors(information, group=self._group, device=device)
        mixing = self._rule.decide(matrix, self._round)

        distance, received = self._apply(tensors, mixing, device, clock)
        names = [unit.name for unit in self._units]
        donors = mixing.donors[rank]
        record = GraftRecord(
            round=self._round,
            donor=donors[0] if donors else ring(mixing.networks)[rank],
            coefficient=dict(zip(names, mixing.own_share(rank), strict=True)),
            information=dict(zip(names, matrix[rank].tolist(), strict=True)),
            distance=dict(zip(names, distance, strict=True)),
            seconds=clock.total(),
            phase_seconds=clock.seconds,
            bytes_received=received,
        )
        self._round += 1
        return record

    def check(self) -> None:
        """Compare models, options and round with the other ranks now, not in the next round.

        Every rank of the group must call this. No weight is read.

        Raises (on every rank alike): DisagreementError, PeerError, as `graft` does.
        """
        tensors = graft_tensors(self._module)
        home = next(iter(tensors.values())).device
        before = self._round - 1
        with self._peers(before):
            self._arrive(before)
            self._agree(tensors, ALL_FINITE, communication_device(self._group, home))

    def _agree(self, tensors: dict[str, Tensor], not_finite: int, device: torch.device) -> None:
        schema = Schema(tensors, [unit.name for unit in self._units], self._options())
        header = Header(
            protocol=PROTOCOL,
            network=dist.get_rank(self._group),
            round=self._round,
            digest=schema.digest,
            schema_bytes=len(schema.json),
            not_finite=not_finite,
            units=len(self._units),
        )
        agree(header, schema, list(tensors), group=self._group, device=device)

    def _measure(self, tensors: dict[str, Tensor]) -> Tensor:
        values = [
            self._rule.information(unit.filters(tensors[unit.lead].detach()))
            for unit in self._units
        ]
        return torch.stack(values).double()

    def _options(self) -> dict[str, Any]:
        kind = type(self._rule)
        fields = getattr(kind, "__dataclass_fields__", {})
        return {name: getattr(self._rule, name) for name in fields} | {
            "rule": kind.__qualname__,
            "lead": self._lead,
            "exchange": self._exchange,
            "bucket_bytes": self._bucket_bytes,
        }

    def _apply(
        self, tensors: dict[str, Tensor], mixing: Mixing, device: torch.device, clock: PhaseClock
    ) -> tuple[list[float], int]:
        """Exchange and blend; returns the distance per unit and the bytes received."""
        rank = dist.get_rank(self._group)
        index = {key: i for i, key in enumerate(tensors)}
        unit_of = {
            index[key]: number for number, unit in enumerate(self._units) for key in unit.tensors
        }
        views = [flat(tensor.detach()) for tensor in tensors.values()]
        donors = mixing.donors[rank]
        fractions = dict(zip(donors, mixing.fractions(rank), strict=True))
        buckets = cut_buckets(
            [view.numel() for view in views],
            [view.dtype for view in views],
            bucket_bytes=self._bucket_bytes,
        )
        squares: list[list[Tensor]] = [[] for _ in self._units]
        received = 0
        moving = EXCHANGES[self._exchange](
            buckets if mixing.networks > 1 else [],
            lambda buffer, bucket: pack_(buffer, bucket, views),
            mixing.donors,
            group=self._group,
            device=device,
            phase=clock.phase,
        )
        while arrival := self._next(moving):
            bucket, parts = arrival
            arriving = len(parts) if self._exchange == "p2p" else mixing.networks - 1
            received += arriving * bucket.bytes
            for piece in bucket.pieces:
                unit = unit_of[piece.tensor]
                own = views[piece.tensor][piece.start : piece.start + piece.length]
                theirs = {
                    donor: part[piece.offset : piece.offset + piece.length].to(own.device)
                    for donor, part in parts.items()
                }
                with clock.phase("distance"):
                    squares[unit].extend(_squared_distance(own, part) for part in theirs.values())
                with clock.phase("blend"):
                    for donor, part in theirs.items():
                        blend_([own], [part], [fractions[donor][unit]])
        with clock.phase("distance"):
            distance = [
                math.sqrt(sum(torch.stack(parts).tolist()) / len(donors)) if parts else 0.0
                for parts in squares
            ]
        return distance, received

    def _next(
        self, moving: Iterator[tuple[Bucket, dict[int, Tensor]]]
    ) -> tuple[Bucket, dict[int, Tensor]] | None:
        with self._peers(self._round):
            return next(moving, None)

    def _arrive(self, round_: int) -> None:
        if self._roll_call:
            self._roll_call.arrive(round_)

    @contextmanager
    def _peers(self, round_: int) -> Iterator[None]:
        """Turn the failure of a collective into an error that says who is missing."""
        try:
            yield
        except RuntimeError as error:
            absent = self._roll_call.absent(round_) if self._roll_call else []
            who = "; ".join(absent) or "a network that had reached it"
            raise PeerError(
                f"round {self._round} failed, a peer died or did not answer: {who}; its own output "
                f"says why ({str(error).splitlines()[0]})"
            ) from error


def _squared_distance(own: Tensor, other: Tensor) -> Tensor:
    kind = torch.promote_types(own.dtype, torch.float32)
    return torch.dist(own.to(kind), other.to(kind)).double().square()


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module, out of any order of compile and data-parallel wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    for path, part in model.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path or 'the model'} is sharded (FSDP), which grafting cannot blend"
            )
    sharded = itertools.chain(model.named_parameters(), model.named_buffers())
    for key, tensor in sharded:
        if type(tensor).__name__ == "DTensor":
            raise ValueError(f"{key} is a sharded DTensor, which grafting cannot blend")
    return model
