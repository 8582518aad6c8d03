"""Brings the processes of a run together: device, backend, store, process group."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_graft.config import RuntimeConfig
from dist_graft.errors import ConfigError, PeerError, StartError
from dist_graft.population.collectives import (
    CommunicationError,
    communicating,
    gather_vectors,
    wait_for,
)
from dist_graft.population.round.exchange import world
from dist_graft.population.runtime.devices import can_use_nccl, choose_device, nccl_unavailable
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.population.runtime.process_info import ProcessInfo, uneven_machines
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.population.runtime.store import StoreClient
from dist_graft.population.runtime.timeouts import Timeouts

_ANSWER_SECONDS = 2.0  # for the store's own time-out to be reported first


@dataclass(frozen=True)
class Runtime:
    """A process that has met its peers."""

    process: ProcessInfo
    device: torch.device
    backend: str
    """As torch.distributed was given it; "none" for a network alone."""
    timeouts: Timeouts
    peers: PeerRegistry | None
    """None for a process alone, or where nobody is to be named."""
    mesh: DeviceMesh | None = None
    """Dimensions network and replica, where several processes train each network."""
    replicas: Replicas = field(default_factory=Replicas)
    """The processes of this network."""

    @property
    def group_across_networks(self) -> dist.ProcessGroup | None:
        """The process of each network that has this one's place in it; None: all processes."""
        return self.mesh.get_group("network") if self.mesh else None

    def observe_epoch(self, epoch_seconds: float) -> None:
        """An epoch of some network took so long: peers are waited for accordingly from now on."""
        self.timeouts.observe_epoch(epoch_seconds)
        self._extend_group_timeouts()

    def observe_local_epoch(self, epoch_seconds: float) -> None:
        """As `observe_epoch`, of this process's epoch, before it meets the others."""
        self.timeouts.observe_local_epoch(epoch_seconds)
        self._extend_group_timeouts()

    def _extend_group_timeouts(self) -> None:
        """A backend ends a collective by the time-out of its group, whoever would wait longer."""
        if self.process.world_size > 1:
            limit = timedelta(seconds=self.timeouts.longest_wait)
            for group in {world(), self.group_across_networks or world()}:
                dist.set_timeout(limit, group)

    def gather(self, values: list[float], what: str) -> list[list[float]]:
        """The networks' numbers, as many from each, in their order: a collective.

        What the first process of each network says counts; all call this.

        Raises: PeerError, saying during what, when a peer died or did not answer.
        """
        return self.gather_all_ranks(values, what)[:: self.process.replicas]

    def gather_all_ranks(self, values: list[float], what: str) -> list[list[float]]:
        """As `gather`, a row for each process."""
        if self.process.world_size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64)
        try:
            everyone = gather_vectors(
                mine,
                group=world(),
                device=torch.device("cpu"),
                seconds=self.timeouts.seconds,
                on_wait=self._announce(what),
            )
        except CommunicationError as error:
            raise self._lost(what, error) from error
        return [list(map(float, row)) for row in everyone.tolist()]

    def broadcast_text(self, what: str, text: str) -> str:
        """What rank 0 says, to everyone; the text of the others does not count.

        Raises: PeerError when it says nothing in time.
        """
        if self.peers is None:
            return text
        if self.process.rank == 0:
            self.peers.publish(what, text)
        return self.peers.read(what, 0, self.timeouts.seconds)

    def hosts(self) -> list[str]:
        """Where the processes run, in their order."""
        return self.peers.hosts() if self.peers else [socket.gethostname()]

    def gather_texts(self, what: str, text: str) -> list[str]:
        """Everyone's text, in the order of their ranks; every process must call this.

        Raises: PeerError when one leaves none in time.
        """
        if self.peers is None:
            return [text]
        self.peers.publish(what, text)
        return self.peers.collect(what, self.timeouts.seconds)

    def sum_over_networks(self, tensor: Tensor, what: str) -> Tensor:
        """Sum of the networks' tensors of one shape, on the CPU: a collective.

        Raises: PeerError, saying during what, when a peer died or did not answer.
        """
        if self.process.networks == 1:
            return tensor.cpu()
        total = tensor.cpu().clone()
        on_wait = self._announce(what)
        try:
            with communicating():
                work = dist.all_reduce(total, group=self.group_across_networks, async_op=True)
                assert work is not None
                wait_for(work, self.timeouts.seconds, on_wait)
        except CommunicationError as error:
            raise self._lost(what, error) from error
        return total

    def shutdown(self) -> None:
        """Part from the peers after a run that went well: a collective."""
        if self.process.world_size > 1:
            self.gather([0.0], "the end of the run")
            dist.destroy_process_group()

    def _announce(self, what: str) -> Callable[[float], None]:
        """Say that this process is there; returns what to call while it waits for the others."""
        if self.peers is None:
            return lambda waited: None
        self.peers.publish(what, "")
        return self.timeouts.warn_when_slow(what, partial(self.peers.missing, what))

    def _lost(self, what: str, error: CommunicationError) -> PeerError:
        peers = self.peers
        who = "; ".join(peers.dead_peers() or peers.missing(what)) if peers else ""
        return PeerError(
            f"lost {who or 'another network'} during {what}: it died or did not answer, and its "
            f"own output says why ({error})"
        )


def start(config: RuntimeConfig, process: ProcessInfo) -> Runtime:
    """Choose the device and meet the peers; every process of the run must call this.

    Raises: ConfigError for a device or backend that is not there; StartError when the processes do
        not find each other in time, naming those that are missing.
    """
    device = choose_device(config.device, process)
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.backend == "nccl":
        raise nccl_unavailable(device)
    timeouts = Timeouts(config.timeout_seconds, epochs=config.timeout_epochs)
    if process.world_size == 1:
        return Runtime(process, device, "none", timeouts, None)

    store = _meet(process, config.timeout_seconds)
    answering = StoreClient(dist.PrefixStore("dist_graft", store), lambda: timeouts.seconds)
    peers = PeerRegistry(answering, process.rank, process.world_size, process.replicas)
    peers.check_in(config.timeout_seconds)
    if process.replicas > 1:
        _refuse_uneven_machines(process, peers, config.timeout_seconds)
    nccl = can_use_nccl(device, peers, config.timeout_seconds)
    if config.backend == "nccl" and not nccl:
        raise nccl_unavailable(device)
    nccl = nccl and config.backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    timeout = timedelta(seconds=config.timeout_seconds)  # waits over gloo have their own
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("process_group", store),
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
            device_id=device if nccl else None,
        )
        mesh = _mesh(process, "cuda" if nccl else "cpu", timeout) if process.replicas > 1 else None
    except RuntimeError as error:
        raise StartError(
            f"backend {backend} could not connect the processes: {_first_line(error)}; check that "
            "the hosts reach each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from error
    group = mesh.get_group("replica") if mesh else None
    replicas = Replicas(group, timeouts, peers)
    return Runtime(process, device, backend, timeouts, peers, mesh, replicas)


def _refuse_uneven_machines(process: ProcessInfo, peers: PeerRegistry, seconds: float) -> None:
    """Raise ConfigError in every process where the machines have different numbers of them."""
    peers.publish("processes here", str(process.local_world_size))
    sizes = sorted({int(size) for size in peers.collect("processes here", seconds)})
    if len(sizes) > 1:
        raise uneven_machines(
            process.replicas, f"machines of {' and '.join(map(str, sizes))} processes"
        )


def _mesh(process: ProcessInfo, device_type: str, timeout: timedelta) -> DeviceMesh:
    """The processes as [network, replica]; every process must call this.

    The groups are made here, and not by the mesh, so that each has all backends and this time-out.
    """
    ranks = torch.arange(process.world_size).view(process.networks, process.replicas)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    assert isinstance(across, dist.ProcessGroup)
    assert isinstance(within, dist.ProcessGroup)
    return DeviceMesh.from_group(
        [across, within], device_type, ranks, mesh_dim_names=("network", "replica")
    )


def _meet(process: ProcessInfo, timeout_seconds: float) -> dist.PrefixStore:
    """The run's key-value store: torchrun's own when there is one, else opened by rank 0."""
    host = os.environ.get("MASTER_ADDR")
    port = os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise StartError("MASTER_ADDR and MASTER_PORT are not set: start with torchrun")
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = process.rank == 0 and not by_launcher
    opened: queue.SimpleQueue[dist.TCPStore | RuntimeError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            store = dist.TCPStore(
                host,
                int(port),
                world_size=process.world_size,
                is_master=serves,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_seconds),
            )
        except RuntimeError as error:
            opened.put(error)
        else:
            opened.put(store)

    # In a thread, because it waits for ever for the answer of a port that is somebody else's.
    threading.Thread(target=connect, daemon=True).start()
    try:
        store = opened.get(timeout=timeout_seconds + _ANSWER_SECONDS)
    except queue.Empty:
        store = RuntimeError("what listens there does not answer, and is no store of this run")
    if isinstance(store, RuntimeError):
        what = "opened" if serves else "reached"
        raise StartError(
            f"port {port} of {host} could not be {what}: {_first_line(store)}; choose a free "
            "MASTER_PORT that all hosts can reach"
        ) from store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
