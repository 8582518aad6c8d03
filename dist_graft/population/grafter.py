"""One round after another: agree, decide, exchange, apply, record."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import astuple
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.information import is_finite
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.topology import ring
from dist_graft.grafting.units import GraftUnit, Lead, graft_tensors, graft_units
from dist_graft.phase_timer import PhaseTimer
from dist_graft.population.round.agreement import (
    LOSS,
    PROTOCOL,
    RATE_UNIT,
    SOUND,
    Agreement,
    Header,
    Schema,
    agree,
    of_one_network,
)
from dist_graft.population.round.apply_mixing import apply_mixing
from dist_graft.population.round.exchange import (
    EXCHANGES,
    BufferPool,
    Exchange,
    communication_device,
)
from dist_graft.population.round.groups import RoundGroups
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.replicas import average_buffers
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.population.unwrap import unwrapped

PHASES = ("measure", "agree", "pack", "exchange", "distance", "blend")
"""Of a round."""
OnDivergence = Literal["raise", "heal", "exclude"]


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
        replica_group: the processes that hold this network too, in the same order for every
            network (with a `group` for each place in that order, as in a device mesh); None: this
            process alone. Each moves and blends an equal share of the weights; floating buffers,
            which data-parallel training leaves different, are averaged first.
        on_divergence: what becomes of a network whose weights are no longer finite: "raise" a
            NonFiniteError on every rank; "heal" it with the weights of its donor, or the nearest
            sound network upstream (its optimizer's state is the caller's to reset); "exclude" it,
            so that nobody takes from it and it stays as it is. When all diverged, it is an error.
        peers: lets errors name the network that is missing.
        timeouts: how long to wait for the others; None: the group's own time-out.

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
        replica_group: dist.ProcessGroup | None = None,
        on_divergence: OnDivergence = "raise",
        peers: PeerRegistry | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "Grafter needs a process group: call torch.distributed.init_process_group first"
            )
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if on_divergence not in get_args(OnDivergence):
            raise ValueError(
                f"on_divergence must be one of {', '.join(get_args(OnDivergence))}, got "
                f"{on_divergence!r}"
            )
        given = (amplitude, sensitivity, num_bins, criterion)
        if rule is not None and given != (0.4, 5.0, 10, "entropy"):
            raise ValueError(
                "amplitude, sensitivity, num_bins and criterion belong to the rule: give them there"
            )
        if not (bucket_mb > 0 and math.isfinite(bucket_mb)):
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb!r}")
        self._module = unwrapped(model)
        self._units = graft_units(self._module, lead=lead)
        self._lead = lead
        self._exchange: Exchange = exchange
        self._bucket_bytes = max(1, int(bucket_mb * 2**20))
        self._rule = rule or Graft(
            amplitude=amplitude, sensitivity=sensitivity, num_bins=num_bins, criterion=criterion
        )
        self._meeting = RoundGroups(group, replica_group, peers, timeouts)
        self._pool = BufferPool()
        self._on_divergence: OnDivergence = on_divergence
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

    def graft(
        self, *, rate: float = 1.0, stop: bool = False, saves: int = 0, diverged: bool = False
    ) -> GraftRecord:
        """One round: every rank of the groups must call this, equally often.

        Changes the model's floating parameters and buffers in place; integer buffers stay.

        Args:
            rate: what every donor's share is multiplied with, in [0, 1]; the same on every rank.
            stop: this rank wants to stop instead: all ranks learn it, and none takes part.
            saves: checkpoint sets at which this rank took part on request.
            diverged: this network is of no use although its weights are finite (its loss is not).

        Raises (on every rank alike): RoundStoppedError when a rank wants to stop;
            RoundPostponedError when some ranks took part in fewer requested checkpoint sets: these
            save, and all call again; DisagreementError when the models or options differ,
            NonFiniteError when a network diverged that is not to be healed or excluded;
            PeerError when another process died or did not answer. But for the last case no weight
            was changed.
        """
        meeting = self._meeting
        rank, group = meeting.network, meeting.group
        tensors = graft_tensors(self._module)
        home = _home(tensors)
        timer = PhaseTimer(PHASES, home)

        if meeting.replicas:
            with timer.phase("agree"), self._peers(self._round):
                stop = bool(meeting.of_replicas(torch.tensor([int(stop)]), home).any())
                if not stop:
                    average_buffers(self._module, partial(meeting.of_replicas, home=home))
        with timer.phase("measure"):
            state = SOUND if stop else self._state_of(tensors, diverged)
            silent = stop or state != SOUND
            mine = None if silent else self._rule.measure(self._units, tensors).double()
        with timer.phase("agree"), self._peers(self._round):
            agreement = self._agree(tensors, self._round, state, mine, rate, stop=stop, saves=saves)
            if mine is None or rank in agreement.diverged:  # it has nothing to tell
                mine = torch.zeros(agreement.measured, dtype=torch.float64)
            matrix = meeting.of_networks(mine, home)
        mixing = self._rule.decide(matrix, self._round)
        if rate != 1.0:
            mixing = mixing.scaled(rate)
        if agreement.diverged:
            heal = self._on_divergence == "heal"
            mixing = without_diverged(mixing, agreement.diverged, heal=heal)

        with self._peers(self._round):
            applied = apply_mixing(
                tensors,
                self._units,
                mixing,
                exchange=self._exchange,
                bucket_bytes=self._bucket_bytes,
                group=group,
                device=communication_device(group, home),
                pool=self._pool,
                phase=timer.phase,
                seconds=meeting.seconds,
                replicas=meeting.replicas,
            )
        informed = state == SOUND and hasattr(self._rule, "criterion")
        names = [unit.name for unit in self._units]
        donors = mixing.donors[rank]
        record = GraftRecord(
            round=self._round,
            network=rank,
            donor=donors[0] if donors else ring(mixing.networks)[rank],
            coefficient=dict(zip(names, mixing.own_share(rank), strict=True)),
            information=dict(zip(names, matrix[rank].tolist() if informed else [], strict=False)),
            distance=dict(zip(names, applied.distance, strict=False)),
            seconds=timer.total(),
            phase_seconds=timer.seconds,
            bytes_received=applied.bytes_received,
            diverged=agreement.diverged,
            mixing=mixing,
            healed={
                network: donor for network in agreement.diverged for donor in mixing.donors[network]
            },
        )
        self._round += 1
        return record

    def check(self) -> None:
        """Compare models, options and round with the other ranks now, not in the next round.

        Every rank of the group must call this. No weight is read.

        Raises (on every rank alike): DisagreementError, PeerError, as `graft` does.
        """
        before = self._round - 1
        with self._peers(before):
            self._agree(graft_tensors(self._module), before)

    def _agree(
        self,
        tensors: dict[str, Tensor],
        arriving_at: int,
        state: int = SOUND,
        mine: Tensor | None = None,
        rate: float = 1.0,
        *,
        stop: bool = False,
        saves: int = 0,
    ) -> Agreement:
        self._meeting.arrive(arriving_at)
        home = _home(tensors)
        schema = Schema(tensors, [unit.name for unit in self._units], self._options())
        header = Header(
            protocol=PROTOCOL,
            network=self._meeting.network,
            round=self._round,
            digest=schema.digest,
            schema_bytes=len(schema.json),
            diverged=state,
            units=len(self._units),
            measured=-1 if mine is None else mine.numel(),
            rate=round(rate * RATE_UNIT),
            stop=int(stop),
            saves=saves,
        )
        said = torch.tensor(astuple(header), dtype=torch.int64)
        rows = self._meeting.of_replicas(said, home).tolist()
        header = of_one_network([Header(*row) for row in rows])
        return agree(
            header,
            schema,
            list(tensors),
            gather=partial(
                self._meeting.of_networks,
                home=home,
                what=f"round {self._round}",
                arriving_at=arriving_at,
            ),
            tolerant=self._on_divergence != "raise",
        )

    def _peers(self, round_: int) -> AbstractContextManager[None]:
        return self._meeting.naming_missing_peers(round_, f"round {self._round}")

    def _state_of(self, tensors: dict[str, Tensor], diverged: bool) -> int:
        found = (index for index, tensor in enumerate(tensors.values()) if not is_finite(tensor))
        return next(found, LOSS if diverged else SOUND)

    def _options(self) -> dict[str, Any]:
        kind = type(self._rule)
        fields = getattr(kind, "__dataclass_fields__", {})
        return {name: getattr(self._rule, name) for name in fields} | {
            "rule": kind.__qualname__,
            "lead": self._lead,
            "exchange": self._exchange,
            "on_divergence": self._on_divergence,
            "bucket_bytes": self._bucket_bytes,
        }


def _home(tensors: dict[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
