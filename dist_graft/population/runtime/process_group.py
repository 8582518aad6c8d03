"""Process group of a run: device, backend, key-value store and collectives on small values."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_graft.config import RuntimeConfig
from dist_graft.errors import (
    ConfigError,
    DisagreementError,
    DistGraftError,
    PeerError,
    StartError,
    caught,
    from_text,
    to_text,
)
from dist_graft.population.collectives import (
    communicating,
    first_line,
    gather_vectors,
    wait_for,
)
from dist_graft.population.compat import set_timeout
from dist_graft.population.round.exchange import world
from dist_graft.population.runtime.devices import (
    can_use_nccl,
    choose_device,
    nccl_unavailable,
    set_matmul_precision,
)
from dist_graft.population.runtime.peers import PeerRegistry, reporting_lost_peers
from dist_graft.population.runtime.process import communicate_on_loopback, keep_freed_memory
from dist_graft.population.runtime.process_info import (
    ProcessInfo,
    describe_process,
    uneven_machines,
)
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.population.runtime.store import StoreClient, call_with_timeout
from dist_graft.population.runtime.timeouts import Timeouts

_RUNS = itertools.count()
"""Counter of runs in this process; identical on every rank."""
_WATCHDOG_FACTOR = 2.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MIN_THREADS, _MAX_THREADS_PER_CORE = 64, 8  # always accepted; beyond, threads fail to start
_RESPONSE_SECONDS = 2.0  # so that the store reports its timeout first
_MAX_NAMED = 3  # differing options named in an error


@dataclass(frozen=True)
class Runtime:
    """Device, backend and peers of this process. Created by `start`."""

    process: ProcessInfo
    device: torch.device
    backend: str
    """Backend of the default process group; "none" for a single process."""
    timeouts: Timeouts
    peers: PeerRegistry | None
    """None for a single process; without it, errors do not name peers."""
    mesh: DeviceMesh | None = None
    """Dimensions "network" and "replica", if several processes train each network."""
    replicas: Replicas = field(default_factory=Replicas)
    """The processes of this network."""

    @property
    def group_across_networks(self) -> dist.ProcessGroup | None:
        """Processes with this replica index, one of each network; None: the default group."""
        return self.mesh.get_group("network") if self.mesh else None

    def observe_epoch(self, epoch_seconds: float) -> None:
        """Adapt the timeouts to the duration of an epoch of any network."""
        self.timeouts.observe_epoch(epoch_seconds)
        self._extend_group_timeouts()

    def observe_local_epoch(self, epoch_seconds: float) -> None:
        """Adapt the timeouts to this process's epoch, before the others have reported theirs."""
        self.timeouts.observe_local_epoch(epoch_seconds)
        self._extend_group_timeouts()

    def _extend_group_timeouts(self) -> None:
        """Extend the groups' timeouts, which end a collective regardless of our own timeout."""
        if self.process.world_size > 1:
            nccl = "nccl" in self.backend
            limit = _group_timeout(self.timeouts.longest_wait, nccl=nccl)
            groups = {world(), self.group_across_networks or world()}
            if nccl:
                groups.add(self.replicas.group or world())
            for group in groups:
                set_timeout(limit, group)

    def gather(self, values: list[float], what: str) -> list[list[float]]:
        """Gather values of the same length from the leader of each network: a collective.

        Every process must call this.

        Args:
            values: values of this process.
            what: the operation, for error messages.

        Returns: one row for each network.

        Raises: PeerError when a peer died or did not respond.
        """
        return self.gather_all_ranks(values, what)[:: self.process.replicas]

    def gather_all_ranks(self, values: list[float], what: str) -> list[list[float]]:
        """Gather values as `gather` does, with one row for each process: a collective."""
        if self.process.world_size == 1:
            return [values]
        local = torch.tensor(values, dtype=torch.float64)
        with self._reporting_lost_peers(what):
            gathered = gather_vectors(
                local,
                group=world(),
                device=torch.device("cpu"),
                seconds=self.timeouts.seconds,
                on_wait=self._announce(what),
            )
        return [list(map(float, row)) for row in gathered.tolist()]

    def broadcast_text(self, key: str, text: str) -> str:
        """Text of rank 0 under a key of the store; every process must call this.

        Raises: PeerError when rank 0 does not publish it in time.
        """
        if self.peers is None:
            return text
        if self.process.is_main:
            self.peers.publish(key, text)
        return self.peers.read(key, 0, self.timeouts.seconds)

    def hosts(self) -> list[str]:
        """Host of each process, by rank."""
        return self.peers.hosts() if self.peers else [socket.gethostname()]

    def gather_texts(self, key: str, text: str) -> list[str]:
        """Texts of all processes under a key of the store, by rank; every process must call this.

        Raises: PeerError when a process does not publish its text in time.
        """
        if self.peers is None:
            return [text]
        self.peers.publish(key, text)
        return self.peers.collect(key, self.timeouts.seconds)

    def raise_together(self, error: DistGraftError | None, what: str) -> None:
        """Raise the error of the lowest rank that has one, on all ranks: a collective.

        Otherwise that rank would exit alone, and the others would report its loss.

        Args:
            error: error of this process, or None.
            what: operation that may have failed, for the message if a peer is lost.

        Raises: that error; PeerError if a peer died or did not respond.
        """
        try:
            rows = self.gather_all_ranks([float(error is not None)], what)
        except PeerError:
            if error is None:
                raise
            raise error from error.__cause__  # the others may be slow to come here
        failed = [rank for rank, (flag,) in enumerate(rows) if flag]
        if not failed:
            return
        if self.peers is not None:
            key = f"{what}: the error"
            if error is not None:
                self.peers.publish(key, to_text(error))
            text = self.peers.read(key, failed[0], self.timeouts.seconds)
            self.gather([0.0], f"{what}: the end")  # the store's host may exit after this
            if failed[0] != self.process.rank:
                error = from_text(text)
        assert error is not None
        error.is_common = True
        raise error

    def call_on_main(self, function: Callable[[], str], what: str) -> str:
        """Text that a function returns on rank 0, or its error, on all ranks: a collective.

        Raises: the function's error, and PeerError, as `raise_together` does.
        """
        text = ""
        with caught() as found:
            if self.process.is_main:
                text = function()
        self.raise_together(found.error, what)
        return self.broadcast_text(f"{what}: the result", text)

    def sum_over_networks(self, tensor: Tensor, what: str) -> Tensor:
        """Sum of the networks' tensors of equal shape, on the CPU: a collective.

        Raises: PeerError when a peer died or did not respond.
        """
        if self.process.connected_networks == 1:
            return tensor.cpu()
        total = tensor.cpu().clone()
        on_wait = self._announce(what)
        with self._reporting_lost_peers(what), communicating():
            work = dist.all_reduce(total, group=self.group_across_networks, async_op=True)
            assert work is not None
            wait_for(work, self.timeouts.seconds, on_wait)
        return total

    def shutdown(self) -> None:
        """Destroy the process group after a successful run: a collective."""
        if self.process.world_size > 1:
            self.gather([0.0], "the end of the run")
            dist.destroy_process_group()

    def _announce(self, what: str) -> Callable[[float], None]:
        """Publish that this process has arrived; returns the callback for its wait."""
        if self.peers is None:
            return lambda waited: None
        self.peers.publish(what, "")
        return self.timeouts.warn_when_slow(what, partial(self.peers.missing, what))

    def _reporting_lost_peers(self, what: str) -> AbstractContextManager[None]:
        return reporting_lost_peers(what, partial(self._lost, what), otherwise="another network")

    def _lost(self, what: str) -> list[str]:
        return (self.peers.dead_peers() or self.peers.missing(what)) if self.peers else []


def start(config: RuntimeConfig, process: ProcessInfo, options: str = "{}") -> Runtime:
    """Choose the device and initialize the process group; every process must call this.

    Sets torch's number of threads, its deterministic mode, the precision of matrix products and the
    current CUDA device.

    Args:
        config: options of this process.
        process: its rank and network.
        options: what all processes must have in common, by name, as JSON.

    Raises: ConfigError for a device or backend that is not available; StartError naming the
        processes that did not start in time; DisagreementError if options differ.
    """
    if dist.is_initialized():
        raise StartError(
            "torch.distributed is already initialized in this process: a run creates its own "
            "process group, and cannot follow a run that failed in the same process"
        )

    # Device and torch's global settings.
    device = choose_device(config.device, process)
    if config.threads > max(_MIN_THREADS, _MAX_THREADS_PER_CORE * (os.cpu_count() or 1)):
        raise ConfigError(
            f"runtime.threads {config.threads} exceeds the limit for {os.cpu_count()} CPU cores: "
            "use at most one per core"
        )
    torch.set_num_threads(config.threads or process.cpu_share())
    if device.type == "cpu":
        keep_freed_memory()
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("runtime.precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if config.sync_bn and process.replicas > 1 and device.type == "cpu":
        raise ConfigError("runtime.sync_bn needs GPUs: torch has no SyncBatchNorm for the CPU")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    set_matmul_precision(config.matmul_precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.backend == "nccl":
        raise nccl_unavailable(device)
    timeouts = Timeouts(config.timeout_seconds, epochs=config.timeout_epochs)
    if process.world_size == 1:
        return Runtime(process, device, "none", timeouts, None)

    # Key-value store, through which all processes find each other.
    store = _connect_store(process, config.timeout_seconds)
    client = StoreClient(dist.PrefixStore("dist_graft", store), lambda: timeouts.seconds)
    peers = PeerRegistry(
        client,
        process.rank,
        process.world_size,
        process.replicas,
        first_network=process.first_network,
    )
    peers.check_in(config.timeout_seconds)
    _refuse_differences(process, options, peers, config.timeout_seconds)

    # Backend and process groups.
    nccl = can_use_nccl(device, peers, config.timeout_seconds)
    if config.backend == "nccl" and not nccl:
        raise nccl_unavailable(device)
    nccl = nccl and config.backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    timeout = _group_timeout(config.timeout_seconds, nccl=nccl)  # most waits use `timeouts`
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("process_group", store),
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
            # Replicas use smaller groups. Bound to a device, the NCCL communicators of those would
            # be split from that of all processes, by all processes, for one group after another.
            device_id=device if nccl and process.replicas == 1 else None,
        )
        mesh = _mesh(process, "cuda" if nccl else "cpu", timeout) if process.replicas > 1 else None
    except RuntimeError as error:
        raise StartError(
            f"backend {backend} could not connect the processes: {first_line(error)}; check that "
            "the hosts reach each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from error
    group = mesh.get_group("replica") if mesh else None
    replicas = Replicas(group, timeouts, peers)
    return Runtime(process, device, backend, timeouts, peers, mesh, replicas)


def _group_timeout(seconds: float, *, nccl: bool) -> timedelta:
    """Timeout of a process group whose waits end after `seconds`.

    Longer with NCCL: its watchdog aborts the process without our error message, and counts from
    when a collective is queued, not from when the host waits for it.
    """
    return timedelta(seconds=_WATCHDOG_FACTOR * seconds if nccl else seconds)


def _refuse_differences(
    process: ProcessInfo, options: str, peers: PeerRegistry, seconds: float
) -> None:
    """Check in every process that all have the same options and fit together.

    Raises: DisagreementError if options differ; ConfigError if machines run different numbers of
        processes, and several train each network.
    """
    digest = hashlib.sha256(options.encode()).hexdigest()
    peers.publish("group", f"{process.local_world_size} {digest}")
    rows = [text.split() for text in peers.collect("group", seconds)]
    sizes, digests = (sorted(set(column)) for column in zip(*rows, strict=True))
    refusal: DistGraftError | None = None
    if len(digests) > 1:
        peers.publish("options", options)
        refusal = different_options(
            peers.collect("options", seconds),
            [
                describe_process(rank, process.replicas, host)
                for rank, host in enumerate(peers.hosts())
            ],
        )
    elif len(sizes) > 1 and process.replicas > 1:
        refusal = uneven_machines(process.replicas, f"machines of {' and '.join(sizes)} processes")
    if refusal:
        peers.publish("group: read", "")
        peers.collect("group: read", seconds)  # a launcher ends the others once one has exited
        peers.publish("group: end", "")
        if process.is_main:  # may host the store, so it exits last
            peers.collect("group: end", seconds)
        raise refusal


def different_options(texts: Sequence[str], processes: Sequence[str]) -> DisagreementError:
    """Error for options that differ, naming up to three, with values and processes.

    Args:
        texts: options of each process, as JSON.
        processes: description of each process.
    """
    options = [json.loads(text) for text in texts]
    different = []
    for name in dict.fromkeys(name for values in options for name in values):
        users: dict[str, list[str]] = {}
        for values, process in zip(options, processes, strict=True):
            users.setdefault(repr(values.get(name)), []).append(process)
        if len(users) > 1:
            values_of = (
                f"{value} in {who[0]}{f' and {len(who) - 1} more' if who[1:] else ''}"
                for value, who in users.items()
            )
            different.append(f"{name} is {', '.join(values_of)}")
    more = len(different) - _MAX_NAMED
    rest = f"; and {more} more options" if more > 0 else ""
    return DisagreementError(
        "the processes were started with different options: "
        f"{'; '.join(different[:_MAX_NAMED])}{rest}; start all with the same options"
    )


def _mesh(process: ProcessInfo, device_type: str, timeout: timedelta) -> DeviceMesh:
    """Device mesh [network, replica]; every process must call this.

    The groups are created here and not by the mesh, so that each has all backends and this timeout.
    A process creates only its own two, with their members only; all start with the one across the
    networks.
    """
    ranks = torch.arange(process.world_size).view(process.connected_networks, process.replicas)
    create = partial(dist.new_group, timeout=timeout, use_local_synchronization=True)
    across = create(ranks[:, process.replica].tolist())
    within = create(ranks[process.rank // process.replicas].tolist())
    assert isinstance(across, dist.ProcessGroup)
    assert isinstance(within, dist.ProcessGroup)
    return DeviceMesh.from_group(
        [across, within], device_type, ranks, mesh_dim_names=("network", "replica")
    )


def _connect_store(process: ProcessInfo, timeout_seconds: float) -> dist.PrefixStore:
    """Key-value store of the run: torchrun's, or one that rank 0 opens."""
    host = os.environ.get("MASTER_ADDR")
    port = os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise StartError("MASTER_ADDR and MASTER_PORT are not set: start with torchrun")
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = process.is_main and not by_launcher
    listener = None
    if host in _LOOPBACK:  # all processes are on this machine
        communicate_on_loopback()
        with suppress(
            OSError
        ):  # open already: by an earlier run of this process, or reported below
            listener = socket.create_server(("127.0.0.1", int(port))) if is_server else None
    connect = partial(
        dist.TCPStore,
        host,
        int(port),
        world_size=process.world_size,
        is_master=is_server,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        multi_tenant=True,  # a second run in this process reuses the server
        master_listen_fd=listener.detach() if listener else None,
    )
    try:
        # torch does not bound the wait for a response on another program's port.
        store = call_with_timeout(connect, timeout_seconds + _RESPONSE_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        is_late = isinstance(error, TimeoutError)
        cause = "another program listens there" if is_late else first_line(error)
        what = "opened" if is_server else "reached"
        raise StartError(
            f"port {port} of {host} could not be {what}: {cause}; choose a free MASTER_PORT that "
            "all hosts can reach"
        ) from error
    # Keys of an earlier attempt, or of an earlier run of this process, must not be read again.
    return dist.PrefixStore(f"attempt_{process.restarts}/run_{next(_RUNS)}", store)
