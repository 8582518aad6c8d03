"""Rank, network and replica of a process, read from the environment without importing torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dist_graft.errors import ConfigError, StartError


@dataclass(frozen=True)
class ProcessInfo:
    """Position of a process in its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher such as torchrun started the process."""
    restarts: int = 0
    """Number of times that the launcher has restarted the processes."""
    replicas: int = 1
    """Number of processes that train one network together. Their ranks are consecutive, so that
    they share a machine where possible, and the peers on the ring of networks are close."""
    first_network: int = 0
    """Network of rank 0; above 0 only where each network is an independent job."""
    population: int | None = None
    """Size of a population whose networks are separate jobs; None: all run together."""

    @property
    def network(self) -> int:
        """Index of the network that the process trains."""
        return self.first_network + self.rank // self.replicas

    @property
    def networks(self) -> int:
        """Number of networks in the population."""
        return self.population or self.connected_networks

    @property
    def connected_networks(self) -> int:
        """Number of networks whose processes form one process group: all, or a job's own."""
        return self.world_size // self.replicas

    @property
    def replica(self) -> int:
        """Index of the process within its network."""
        return self.rank % self.replicas

    @property
    def is_leader(self) -> bool:
        """Whether this is the process that writes the files of its network."""
        return self.replica == 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes the files of the whole run (of the job,
        where each network is an independent job).
        """
        return self.rank == 0

    def __str__(self) -> str:
        host = socket.gethostname()
        return describe_process(self.rank, self.replicas, host, first=self.first_network)

    def with_replicas(self, replicas: int) -> ProcessInfo:
        """Return the position in a run in which `replicas` processes train each network.

        Raises: ConfigError when the number of processes does not fit, naming numbers that do.
        """
        local = self.local_world_size
        if self.world_size % replicas:
            started = "process was" if self.world_size == 1 else "processes were"
            raise ConfigError(
                f"runtime.replicas {replicas} needs {replicas} processes for each network, and "
                f"{self.world_size} {started} started: start {replicas}, {2 * replicas}, "
                f"{3 * replicas} ... (torchrun --nproc-per-node)"
            )
        is_split = local % replicas and replicas % local
        if replicas > 1 and (is_split or self.world_size % local):
            raise uneven_machines(
                replicas, f"{local} of {self.world_size} processes on this machine"
            )
        return replace(self, replicas=replicas)

    def as_job(self, network: int, population: int) -> ProcessInfo:
        """Return the position in a job that trains one network of a population on its own.

        Raises: ConfigError when the number of processes is not that of the network's replicas.
        """
        if self.world_size != self.replicas:
            raise ConfigError(
                f"graft.exchange files trains one network in each job, with runtime.replicas "
                f"{self.replicas}, and {self.world_size} processes were started: start "
                f"{self.replicas} for each network"
            )
        return replace(self, first_network=network, population=population)

    def cores(self) -> int:
        """Number of CPU cores for all processes of this run on this machine.

        Those of torchrun, if it started the processes: it may bind each to some (--numa-binding).
        Under Slurm at most those allocated to the job step: without task binding
        (TaskPlugin=task/none) the affinity mask covers the whole machine.
        """
        by_torchrun = self.launched and "TORCHELASTIC_RUN_ID" in os.environ
        cores = len(os.sched_getaffinity(os.getppid() if by_torchrun else 0))
        allocated = os.environ.get("SLURM_CPUS_ON_NODE", "")
        return min(cores, int(allocated)) if allocated.isdecimal() else cores

    def cpu_share(self) -> int:
        """Number of CPU cores for this process, at least 1."""
        equal = self.cores() // self.local_world_size
        return max(1, min(len(os.sched_getaffinity(0)), equal))


def describe_process(rank: int, replicas: int, host: str, *, first: int = 0) -> str:
    """Network (rank 0 trains `first`), replica if there are several, rank and host of a process."""
    network, replica = divmod(rank, replicas)
    which = f"replica {replica}, " if replicas > 1 else ""
    return f"network {first + network} ({which}rank {rank} on {host})"


def uneven_machines(replicas: int, found: str) -> ConfigError:
    """Error for machines whose numbers of processes do not fit the number of replicas."""
    fill = [str(size) for size in range(1, replicas) if replicas % size == 0]
    smaller = f", or {' or '.join(fill)} where a network fills several machines" if fill else ""
    return ConfigError(
        f"runtime.replicas {replicas} does not fit {found}: start equally many on each machine, "
        f"{replicas}, {2 * replicas}, {3 * replicas} ...{smaller}"
    )


def array_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """Index of this task in a Slurm array or an indexed Kubernetes job; None outside of one."""
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        if (value := environment.get(name, "")).isdecimal():
            return int(value)
    return None


def read_process_info(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a single process without them.

    Raises: StartError when only some are set, or when they contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return ProcessInfo()
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    except (KeyError, ValueError) as error:
        raise StartError(
            f"the environment has no usable RANK and WORLD_SIZE ({error}): start with torchrun"
        ) from error
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise StartError(
            f"RANK {rank} of WORLD_SIZE {world_size} and LOCAL_RANK {local_rank} of "
            f"LOCAL_WORLD_SIZE {local_world_size} do not fit: start with torchrun"
        )
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return ProcessInfo(
        rank,
        world_size,
        local_rank,
        local_world_size,
        launched=True,
        restarts=int(restarts) if restarts.isdigit() else 0,
    )
