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
from dist_graft.grafting.rules import Graft, Rule
from dist_graft.grafting.topology import ring
from dist_graft.grafting.units import GraftUnit, Lead, graft_tensors, graft_units
from dist_graft.population.agreement import (
    ALL_FINITE,
    PROTOCOL,
    RATE_UNIT,
    Header,
    Schema,
    agree,
    gather_vectors,
)
from dist_graft.population.application import apply_mixing
from dist_graft.population.exchange import (
    EXCHANGES,
    BufferPool,
    Exchange,
    communication_device,
    world,
)
from dist_graft.population.phases import PhaseClock
from dist_graft.population.presence import RollCall
from dist_graft.population.wire import WireError


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
    """Of this network before the round, in the criterion's unit (nats for entropy); empty for a
    rule that has no criterion."""
    distance: dict[str, float]
    """Euclidean distance to the donor (root mean square over several) before the round, over all
    tensors of the unit; empty where single scalars travel."""
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
    keywords from amplitude to criterion are shorthand for `rule=Graft(...)` on the ring.

    Args:
        model: any module: plain, compiled, or wrapped for data-parallel training.
        amplitude: A of eq. 7 in arXiv 2001.05868, in [0, 1].
        sensitivity: c of eq. 7, per unit of information, at least 0.
        num_bins: of the entropy's histogram.
        criterion: "entropy" (eq. 6), "filter_entropy" (eq. 5) or "l1".
        lead: "conv", or "conv+linear" for MLPs and transformers.
        exchange: "all_gather": every rank receives every network, or "p2p": the donor's only.
            Both give the same bits.
        bucket_mb: largest size of one network's part of a buffer, in MiB (in host memory 16 are
            taken where more are allowed, which is faster); all_gather holds networks x
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
        given = (amplitude, sensitivity, num_bins, criterion)
        if rule is not None and given != (0.4, 5.0, 10, "entropy"):
            raise ValueError(
                "amplitude, sensitivity, num_bins and criterion belong to the rule: give them there"
            )
        if not (bucket_mb > 0 and math.isfinite(bucket_mb)):
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb!r}")
        self._module = _unwrap(model)
        self._units = graft_units(self._module, lead=lead)
        self._lead = lead
        self._exchange: Exchange = exchange
        self._bucket_bytes = max(1, int(bucket_mb * 2**20))
        self._rule = rule or Graft(
            amplitude=amplitude, sensitivity=sensitivity, num_bins=num_bins, criterion=criterion
        )
        self._given_group = group
        self._pool = BufferPool()
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

    @property
    def _group(self) -> dist.ProcessGroup:
        """Looked up each time: a default group that is held cannot be destroyed, and its threads
        abort an interpreter that finalizes under them.
        """
        return self._given_group or world()

    def graft(self, *, rate: float = 1.0, stop: bool = False) -> GraftRecord:
        """One round: every rank of the group must call this, equally often.

        Changes the model's floating parameters and buffers in place; integer buffers stay.

        Args:
            rate: what every donor's share is multiplied with, in [0, 1]; the same on every rank.
            stop: this rank wants to stop instead: all ranks learn it, and none takes part.

        Raises (on every rank alike): RoundStoppedError when a rank wants to stop;
            DisagreementError when the models or options differ,
            NonFiniteError when a weight of any network is not finite; PeerError when another
            process died or did not answer. But for the last case no weight was changed.
        """
        rank = dist.get_rank(self._group)
        tensors = graft_tensors(self._module)
        home = next(iter(tensors.values())).device
        device = communication_device(self._group, home)
        clock = PhaseClock(home)

        with clock.phase("measure"):
            bad = ALL_FINITE if stop else _first_not_finite(tensors)
            silent = stop or bad != ALL_FINITE
            mine = None if silent else self._rule.measure(self._units, tensors)
        with clock.phase("agree"), self._peers(self._round):
            self._arrive(self._round)
            self._agree(tensors, bad, device, rate, stop=stop)
            assert mine is not None
            matrix = gather_vectors(mine.double(), group=self._group, device=device)
        mixing = self._rule.decide(matrix, self._round)
        if rate != 1.0:
            mixing = mixing.scaled(rate)

        with self._peers(self._round):
            applied = apply_mixing(
                tensors,
                self._units,
                mixing,
                exchange=self._exchange,
                bucket_bytes=self._bucket_bytes,
                group=self._group,
                device=device,
                pool=self._pool,
                phase=clock.phase,
            )
        informed = matrix[rank].tolist() if hasattr(self._rule, "criterion") else []
        names = [unit.name for unit in self._units]
        donors = mixing.donors[rank]
        record = GraftRecord(
            round=self._round,
            donor=donors[0] if donors else ring(mixing.networks)[rank],
            coefficient=dict(zip(names, mixing.own_share(rank), strict=True)),
            information=dict(zip(names, informed, strict=False)),
            distance=dict(zip(names, applied.distance, strict=False)),
            seconds=clock.total(),
            phase_seconds=clock.seconds,
            bytes_received=applied.bytes_received,
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

    def _agree(
        self,
        tensors: dict[str, Tensor],
        not_finite: int,
        device: torch.device,
        rate: float = 1.0,
        *,
        stop: bool = False,
    ) -> None:
        schema = Schema(tensors, [unit.name for unit in self._units], self._options())
        header = Header(
            protocol=PROTOCOL,
            network=dist.get_rank(self._group),
            round=self._round,
            digest=schema.digest,
            schema_bytes=len(schema.json),
            not_finite=not_finite,
            units=len(self._units),
            rate=round(rate * RATE_UNIT),
            stop=int(stop),
        )
        agree(header, schema, list(tensors), group=self._group, device=device)

    def _options(self) -> dict[str, Any]:
        kind = type(self._rule)
        fields = getattr(kind, "__dataclass_fields__", {})
        return {name: getattr(self._rule, name) for name in fields} | {
            "rule": kind.__qualname__,
            "lead": self._lead,
            "exchange": self._exchange,
            "bucket_bytes": self._bucket_bytes,
        }

    def _arrive(self, round_: int) -> None:
        if self._roll_call:
            self._roll_call.arrive(round_)

    @contextmanager
    def _peers(self, round_: int) -> Iterator[None]:
        """Turn the failure of a collective into an error that says who is missing."""
        try:
            yield
        except WireError as error:
            roll_call = self._roll_call
            absent = (roll_call.gone() or roll_call.absent(round_)) if roll_call else []
            who = "; ".join(absent) or "a network that had reached it"
            raise PeerError(
                f"round {self._round} failed, a peer died or did not answer: {who}; its own output "
                f"says why ({error})"
            ) from error


def _first_not_finite(tensors: dict[str, Tensor]) -> int:
    found = (index for index, tensor in enumerate(tensors.values()) if not is_finite(tensor))
    return next(found, ALL_FINITE)


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
