"""Rounds between the networks of a process group: agree, decide, exchange, apply, record.

Networks that share only a directory (exchange "files") publish, choose, and blend instead.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_graft.errors import NonFiniteError, RoundStoppedError, RunDirectoryError, user_code
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.topology import ring
from dist_graft.grafting.units import GraftUnit, Lead, graft_tensors, graft_units
from dist_graft.phase_timer import PhaseTimer
from dist_graft.population.round.agreement import (
    FINITE,
    MESSAGE_FORMAT,
    RATE_SCALE,
    Agreement,
    Header,
    Schema,
    agree,
    describe_divergence,
    finite_state,
    merge_replica_headers,
    rule_options,
)
from dist_graft.population.round.apply_mixing import Applied, blend_tensors, swap_scalars
from dist_graft.population.round.exchange import (
    EXCHANGES,
    BufferPool,
    Exchange,
    Transport,
    communication_device,
)
from dist_graft.population.round.file_choice import Place, Published, decide_among, needs_step
from dist_graft.population.round.files import (
    Choice,
    FilesRound,
    JobState,
    Search,
    copy_to_host,
    schema_digest,
    undo_blend,
)
from dist_graft.population.round.groups import RoundGroups
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.round.replica_checks import IdentityCheck, warn_if_synchronized
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.replicas import average_buffers
from dist_graft.population.runtime.timeouts import Timeouts

PHASES = ("measure", "agree", "pack", "exchange", "distance", "blend")
"""Phases of a round."""
OnDivergence = Literal["raise", "heal", "exclude"]
_SAME_START = "digest of the weights at the start (model.shared_init)"
_POLL_SECONDS = 1.0  # polling interval for stop requests, while waiting for publications


class Grafter:
    """Grafts the networks of a process group into each other, one network for each rank.

    Create one on every rank after `init_process_group`; the constructor does not communicate. The
    arguments from amplitude to criterion are shorthand for `rule=Graft(...)` on the ring.

    With exchange "files", networks need no process group: each is an independent job that shares a
    directory with the others, and may start, stop, or lag behind at any time (ADR 39). Pass
    `directory`, `network`, and `networks`.

    Args:
        model: any module: plain, compiled, or wrapped for data-parallel training.
        amplitude: A of eq. 7 in arXiv 2001.05868, in [0, 1].
        sensitivity: c of eq. 7, per unit of information, at least 0.
        num_bins: number of bins of the entropy's histogram.
        criterion: "entropy" (eq. 6), "filter_entropy" (eq. 5) or "l1".
        lead: "conv", or "conv+linear" for MLPs and transformers.
        exchange: "all_gather": every rank receives every network; "p2p": only the donor's weights
            are sent. The results are bitwise identical. Over NCCL, rules that average all networks
            use an all-reduce instead, unless torch.use_deterministic_algorithms is set (ADR 35).
            "files": see above.
        bucket_mb: largest size of one network's part of a buffer, in MiB; at most 16 are used in
            host memory, where smaller buckets are faster. all_gather holds networks x bucket, p2p
            two buckets (on the ring).
        rule: population method; None: grafting on the ring.
        group: group with one rank for each network; None: the default group.
        replica_group: group of the processes that hold this network, in the same order for every
            network (each position in that order needs a separate `group`, as in a device mesh);
            None: this process alone. Each process exchanges and blends an equal share of the
            weights. Floating-point buffers, which differ after data-parallel training, are averaged
            first.
        on_divergence: what happens to a network with weights that are not finite. "raise": a
            NonFiniteError on every rank. "heal": it copies its donor, or the nearest finite network
            upstream (the caller resets the optimizer's state). "exclude": it keeps its weights
            and is no donor. It is an error if all networks diverged.
        peers: lets errors name the missing network.
        timeouts: timeouts of the collectives; None: the group's own timeout.
        directory: files: directory that all networks share; weights are published in its folder
            `exchange`.
        network: files: number of this network.
        networks: files: size of the population.
        max_lag: files: only networks within so many epochs, ahead or behind, are donors; 0: only
            those at the same place.
        wait_seconds: files: how long a round waits for its donor (with max_lag 0: for all
            networks); may be infinite.

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
        exchange: Exchange | Literal["files"] = "all_gather",
        bucket_mb: float = 32,
        rule: Rule | None = None,
        group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        on_divergence: OnDivergence = "raise",
        peers: PeerRegistry | None = None,
        timeouts: Timeouts | None = None,
        directory: str | Path | None = None,
        network: int | None = None,
        networks: int | None = None,
        max_lag: float = 2,
        wait_seconds: float = 0,
    ) -> None:
        exchanges = (*EXCHANGES, "files")
        if exchange not in exchanges:
            raise ValueError(f"exchange must be one of {', '.join(exchanges)}, got {exchange!r}")
        if exchange != "files" and not dist.is_initialized():
            raise RuntimeError(
                "Grafter needs a process group: call torch.distributed.init_process_group first"
            )
        if on_divergence not in get_args(OnDivergence):
            raise ValueError(
                f"on_divergence must be one of {', '.join(get_args(OnDivergence))}, got "
                f"{on_divergence!r}"
            )
        shorthand = (amplitude, sensitivity, num_bins, criterion)
        if rule is not None and shorthand != (0.4, 5.0, 10, "entropy"):
            raise ValueError(
                "amplitude, sensitivity, num_bins and criterion are options of Graft: pass them to "
                "the rule"
            )
        if not (bucket_mb > 0 and math.isfinite(bucket_mb)):
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb!r}")
        self._module = _unwrapped(model)
        self.units: list[GraftUnit] = graft_units(self._module, lead=lead)
        """Graft units, in the order of the records."""
        self.round = 0
        """Number of the next round; set it when resuming a run."""
        self._lead = lead
        self._exchange = exchange
        self._bucket_bytes = max(1, int(bucket_mb * 2**20))
        self._rule = rule or Graft(
            amplitude=amplitude, sensitivity=sensitivity, num_bins=num_bins, criterion=criterion
        )
        self.rule_state: dict[str, Tensor] = {}
        """Tensors that the rule keeps between rounds, such as the weights of an outer optimizer.
        Save them with the model, and restore them with `load_rule_state`."""
        self.reset_rule_state()
        if self.rule_state and exchange == "files":
            raise ValueError(needs_step(self._rule))
        if self.rule_state and on_divergence == "exclude":
            raise ValueError(
                f"{type(self._rule).__name__} keeps a state that all networks share, so none "
                "can be excluded: on_divergence must be 'raise' or 'heal'"
            )
        self._groups = RoundGroups(group, replica_group, peers, timeouts)
        wrapped = getattr(model, "_orig_mod", model)
        if isinstance(wrapped, DistributedDataParallel) and exchange != "files":
            warn_if_synchronized(wrapped.process_group, self._groups.group)
        self._pool = BufferPool()
        self._identity_check = IdentityCheck()
        self._on_divergence: OnDivergence = on_divergence
        self._files: FilesRound | None = None
        if exchange == "files":
            if directory is None or network is None or networks is None:
                raise ValueError("exchange 'files' needs directory, network and networks")
            self._files = FilesRound(
                Path(directory),
                network,
                networks,
                self._rule,
                max_lag=max_lag,
                wait_seconds=wait_seconds,
            )
        elif (directory, network, networks, max_lag, wait_seconds) != (None, None, None, 2, 0):
            raise ValueError(
                "directory, network, networks, max_lag and wait_seconds are options of exchange "
                "'files'"
            )

    def graft(
        self,
        *,
        rate: float = 1.0,
        stop: bool = False,
        diverged: bool = False,
        also: Sequence[nn.Module] = (),
        job: JobState | None = None,
    ) -> GraftRecord:
        """Run one round; every rank of the groups must call this equally often.

        With exchange "files", a network runs a round on its own with what the others have
        published.

        Changes the model's floating-point parameters and buffers in place. Integer buffers are not
        changed.

        Args:
            rate: factor for every donor's share, in [0, 1]; identical on every rank.
            stop: whether this rank wants to stop before the round.
            diverged: whether the training loss is not finite, even if the weights are.
            also: modules with the tensors of the model, equally many on every rank, which exchange
                theirs with the same mixing, such as moving averages; not with exchange "files".
            job: files: where the network stands; None: after so many epochs as rounds.

        Returns: the record of the round for this network.

        Raises (on every rank): RoundStoppedError when a rank wants to stop; DisagreementError when
            the models or options differ; NonFiniteError when a network diverged and is neither
            healed nor excluded; PeerError when another process died or did not respond. Except in
            the last case, no weight was changed.
        """
        groups = self._groups
        tensors = graft_tensors(self._module)
        device = _device(tensors)
        timer = PhaseTimer(PHASES, device)

        # Replicas of this network: stop together, or average their buffers.
        if groups.replicas:
            with timer.phase("agree"), self._reporting_missing_peers(self.round):
                stop = bool(groups.gather_replicas(torch.tensor([int(stop)]), device).any())
                if not stop:
                    gather = partial(groups.gather_replicas, device=device)
                    for module in (self._module, *also):
                        average_buffers(module, gather)

        # Measure.
        information = None
        with timer.phase("measure"):
            state = FINITE if stop else finite_state(tensors, diverged)
            if not stop and state == FINITE:
                with self._naming_user_code("criterion"):
                    information = self._rule.measure(self.units, tensors).double()

        # Networks that share only a directory.
        if self._files:
            if also:
                raise ValueError('exchange "files" publishes the model only: also must be empty')
            if stop:
                raise RoundStoppedError(f"network {self._files.network} stops before the round")
            job = job or JobState(place=Place(self.round))
            record = self._graft_files(self._files, tensors, state, information, rate, job, timer)
            self.round += 1
            return record

        # Agree.
        network = groups.network
        with timer.phase("agree"), self._reporting_missing_peers(self.round):
            agreement = self._agree(
                tensors, self.round, state, information, rate, stop=stop, also=len(also)
            )
            if information is None or network in agreement.diverged:
                information = torch.zeros(agreement.measured, dtype=torch.float64)
            matrix = groups.gather_networks(information, device)

        # Decide.
        with self._naming_user_code("criterion", "topology"):
            mixing = self._rule.decide(matrix, self.round)
        if rate != 1.0:
            mixing = mixing.scaled(rate)
        if agreement.diverged:
            heal = self._on_divergence == "heal"
            mixing = without_diverged(mixing, agreement.diverged, heal=heal)

        # Exchange and apply, bucket by bucket.
        assert self._exchange != "files"
        transport = Transport(
            exchange=self._exchange,
            group=groups.group,
            replicas=groups.replicas,
            device=communication_device(groups.group, device),
            bucket_bytes=self._bucket_bytes,
            pool=self._pool,
            phase=timer.phase,
            reduces_means=self._reduces_means(device),
            seconds=groups.seconds,
            on_wait=groups.check_peers,
        )
        with self._reporting_missing_peers(self.round):
            applied = self._apply(tensors, mixing, transport)
            for module in also:
                more = self._apply(graft_tensors(module), mixing, transport)
                applied = replace(
                    applied, bytes_received=applied.bytes_received + more.bytes_received
                )
        if self.rule_state:
            with timer.phase("blend"), torch.no_grad():
                self._rule.after_exchange(self.units, tensors, self.rule_state)

        # Record.
        measured = matrix[network].tolist() if state == FINITE else []
        record = self._record(network, mixing, measured, applied, agreement.diverged, timer)
        self.round += 1
        self._identity_check.observe(record)
        return record

    def _naming_user_code(self, *options: str) -> AbstractContextManager[None]:
        """Name the user's rule, or functions that are options of the rule, if it fails there."""
        kind = type(self._rule)
        names = [f"rule {kind.__module__}:{kind.__qualname__}"]
        if kind.__module__.startswith("dist_graft."):
            values = {option: str(getattr(self._rule, option, "")) for option in options}
            names = [f"{option} {value}" for option, value in values.items() if ":" in value]
        return user_code(" or ".join(names)) if names else nullcontext()

    def _apply(self, tensors: dict[str, Tensor], mixing: Mixing, transport: Transport) -> Applied:
        """Exchange and change tensors in place; every rank of the groups must call this."""
        if mixing.moves_scalars:
            return swap_scalars(tensors, self.units, mixing, transport)
        return blend_tensors(tensors, self.units, mixing, transport)

    def _graft_files(
        self,
        files: FilesRound,
        tensors: dict[str, Tensor],
        state: int,
        information: Tensor | None,
        rate: float,
        job: JobState,
        timer: PhaseTimer,
    ) -> GraftRecord:
        """Publish this network, choose from what others have published, and blend it.

        A collective of the network's replicas, which all use the leader's choice.
        """
        groups, device, network = self._groups, _device(tensors), files.network
        with timer.phase("agree"), self._reporting_missing_peers(self.round):
            states = groups.gather_replicas(torch.tensor([state]), device).flatten().tolist()
        state = next((other for other in states if other != FINITE), FINITE)
        what = describe_divergence(state, list(tensors))
        if what and self._on_divergence == "raise":
            raise NonFiniteError.of_networks({network: what}, self.round)

        # Publish. The network returns to the copy if a donor's file fails during the blend.
        own = self._published(files, tensors, job, None if what else information, diverged=what)
        with timer.phase("pack"):
            copied = copy_to_host(tensors)
            if groups.is_leader:
                files.publish(own, copied)

        # Choose, decide and blend; once more without a donor whose file fails.
        search = files.search(own, tensors)
        while True:
            with timer.phase("agree"), self._reporting_missing_peers(self.round):
                choice = self._agree_on_choice(search, job, device)
            failed = search.open(choice)
            if not failed:
                with self._naming_user_code("criterion", "topology"):
                    decided = decide_among(
                        self._rule,
                        own,
                        [search.found[other].published for other in choice.places],
                        rate=rate,
                        heal=self._on_divergence == "heal",
                    )
                with timer.phase("blend"):
                    applied, failed = search.blend(tensors, self.units, decided)
            with timer.phase("agree"), self._reporting_missing_peers(self.round):
                flags = groups.gather_replicas(torch.tensor([min(failed, default=-1)]), device)
            bad = {int(other) for other in flags.flatten() if other >= 0}
            if not bad:
                break
            undo_blend(tensors, copied)
            search.drop(bad)

        # Record.
        files.end_round(search)
        mixing = decided.for_population(files.networks)
        record = self._record(
            network, mixing, list(own.information), applied, decided.diverged, timer, no_donor=-1
        )
        return replace(record, **choice.provenance(job.place, mixing.donors[network]))

    def _published(
        self,
        files: FilesRound,
        tensors: dict[str, Tensor],
        job: JobState,
        information: Tensor | None,
        *,
        diverged: str = "",
    ) -> Published:
        """Describe this network for its publication."""
        return Published(
            network=files.network,
            place=job.place,
            round=self.round,
            schema=schema_digest(tensors, self.units, self._rule, self._lead),
            information=() if information is None else tuple(information.tolist()),
            lr=job.lr,
            resume=job.resume,
            diverged=diverged,
            units=len(self.units),
        )

    def _agree_on_choice(self, search: Search, job: JobState, device: torch.device) -> Choice:
        """Wait for the leader's choice of publications; a collective of the replicas.

        Raises: RoundStoppedError, on all replicas, when one of them wants to stop.
        """
        groups = self._groups
        while True:
            choice = search.poll(_POLL_SECONDS) if groups.is_leader else None
            found = -1 if choice is None else len(choice.places)
            flags = torch.tensor([int(job.should_stop()), found])
            rows = groups.gather_replicas(flags, device)
            if rows[:, 0].any():
                search.close()
                raise RoundStoppedError(f"a stop was requested before round {self.round}")
            found = int(rows[0, 1])
            if found < 0:
                continue
            return self._leaders_choice(choice, found, job, device)

    def _leaders_choice(
        self, choice: Choice | None, networks: int, job: JobState, device: torch.device
    ) -> Choice:
        """Return the leader's choice; a collective of the replicas.

        Args:
            choice: on the leader; None on the other replicas.
            networks: number of networks in the leader's choice.
            job: this job.
            device: device of the network.
        """
        table = Choice.empty(networks) if choice is None else choice.to_tensor()
        rows = self._groups.gather_replicas(table.flatten(), device)
        return Choice.from_tensor(rows[0].view(table.shape), job.place.steps_per_epoch)

    def join(self, job: JobState | None) -> tuple[int, Place] | None:
        """Copy the weights of the network that has trained farthest (exchange "files").

        A collective of the network's replicas. The model's floating-point parameters and buffers
        are overwritten.

        Returns: the network and its position; None if no other network has published weights.
        """
        files, groups = self._files, self._groups
        if files is None or job is None:
            return None
        tensors = graft_tensors(self._module)
        own = self._published(files, tensors, job, torch.zeros(0))
        search, device = files.search(own, tensors), _device(tensors)
        found = search.farthest() if groups.is_leader else None
        size = len(found.places) if found else 0
        sizes = groups.gather_replicas(torch.tensor([size]), device)
        choice = self._leaders_choice(found, int(sizes[0, 0]), job, device)
        failed = search.open(choice) or search.copy(tensors, choice)
        flags = groups.gather_replicas(torch.tensor([len(failed)]), device)
        search.close()
        if flags.any():
            raise RunDirectoryError(
                f"the weights of network {min(choice.places)} could not be read: run again, or "
                "pass --population.join fresh"
            )
        return next(iter(choice.places.items()), None)

    def reset_rule_state(self) -> None:
        """Reset `rule_state` to the module's current weights. Call it after replacing them."""
        init_state = getattr(self._rule, "init_state", None)  # a rule of the user may be any class
        if init_state:
            self.rule_state = init_state(self.units, graft_tensors(self._module))
        self._state_digest = _digest(self.rule_state)

    def load_rule_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a copy of `rule_state`.

        Raises: KeyError or RuntimeError if the state is of another rule or model.
        """
        for key, value in self.rule_state.items():
            value.copy_(state[key])
        self._state_digest = _digest(self.rule_state)

    def flush(self) -> None:
        """Wait until this network's last publication is written (exchange "files")."""
        if self._files:
            self._files.flush()

    def check(self) -> None:
        """Compare models, options and round with the other ranks before the next round.

        Every rank of the group must call this. Weights are not read.

        Raises (on every rank): DisagreementError or PeerError, as `graft` does.
        """
        if self._files:
            return  # the schemas in the publications are compared
        previous = self.round - 1
        with self._reporting_missing_peers(previous):
            self._agree(graft_tensors(self._module), previous)

    def _agree(
        self,
        tensors: dict[str, Tensor],
        entered_round: int,
        state: int = FINITE,
        information: Tensor | None = None,
        rate: float = 1.0,
        *,
        stop: bool = False,
        also: int = 0,
    ) -> Agreement:
        """Exchange headers; every rank of the groups must call this."""
        groups, device = self._groups, _device(tensors)
        groups.enter_round(entered_round)
        options = self._options(device) | {"also": also}
        schema = Schema(tensors, [unit.name for unit in self.units], options)
        header = Header(
            protocol=MESSAGE_FORMAT,
            network=groups.network,
            round=self.round,
            digest=schema.digest,
            schema_bytes=len(schema.json),
            diverged=state,
            measured=-1 if information is None else information.numel(),
            rate=round(rate * RATE_SCALE),
            stop=int(stop),
        )
        header = merge_replica_headers(groups.gather_replicas(header.to_tensor(), device))
        what = f"round {self.round}"
        return agree(
            header,
            schema,
            list(tensors),
            gather=partial(groups.gather_networks, device=device, what=what, round_=entered_round),
            tolerant=self._on_divergence != "raise",
        )

    def _record(
        self,
        network: int,
        mixing: Mixing,
        measured: list[float],
        applied: Applied,
        diverged: dict[int, str],
        timer: PhaseTimer,
        *,
        no_donor: int | None = None,
    ) -> GraftRecord:
        names = [unit.name for unit in self.units]
        donors = mixing.donors[network]
        reports = getattr(self._rule, "reports_information", False)  # as in reset_rule_state
        information = measured if reports else []
        phase_seconds = timer.seconds  # waits for the device, so before the total
        if no_donor is None:
            no_donor = ring(mixing.networks)[network]
        return GraftRecord(
            round=self.round,
            network=network,
            donor=donors[0] if donors else no_donor,
            coefficient=dict(zip(names, mixing.own_share(network), strict=True)),
            information=dict(zip(names, information, strict=False)),
            distance=dict(zip(names, applied.distance, strict=False)),
            seconds=timer.total(),
            phase_seconds=phase_seconds,
            bytes_received=applied.bytes_received,
            diverged=diverged,
            mixing=mixing,
            healed={other: donor for other in diverged for donor in mixing.donors[other]},
        )

    def _reporting_missing_peers(self, round_: int) -> AbstractContextManager[None]:
        return self._groups.reporting_missing_peers(round_, f"round {self.round}")

    def _reduces_means(self, device: torch.device) -> bool:
        """Whether rounds in which all become the mean, or closer to it, are all-reduced (ADR 35).

        Not in host memory, nor with torch.use_deterministic_algorithms: the round is then bitwise
        equal to `mix`.
        """
        transfers_on = communication_device(self._groups.group, device)
        return transfers_on.type != "cpu" and not torch.are_deterministic_algorithms_enabled()

    def _options(self, device: torch.device) -> dict[str, Any]:
        return (
            rule_options(self._rule)
            | {
                "lead": self._lead,
                "exchange": self._exchange,
                "on_divergence": self._on_divergence,
                "bucket_bytes": self._bucket_bytes,
                "all_reduce": self._reduces_means(device),
            }
            | ({_SAME_START: self._state_digest} if self.rule_state else {})
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile and DistributedDataParallel wrappers, in any order.

    Raises: ValueError naming a sharded submodule or tensor.
    """
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
                f"{path or 'the model'} is sharded (FSDP): sharded models cannot be grafted"
            )
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor).__name__ == "DTensor":
            raise ValueError(f"{key} is a DTensor: sharded models cannot be grafted")
    return model


def _digest(state: Mapping[str, Tensor]) -> str:
    """Return a short hash of the values of all tensors."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _device(tensors: dict[str, Tensor]) -> torch.device:
    """Return the device of all tensors; raises ValueError naming the first on another device."""
    first, *others = tensors
    for key in others:
        if tensors[key].device != tensors[first].device:
            raise ValueError(
                f"{key} is on {tensors[key].device} and {first} on {tensors[first].device}: move "
                "the network to one device"
            )
    return tensors[first].device
