"""Where the launcher put this process, read from the environment without importing torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dist_graft.errors import ConfigError, StartError


@dataclass(frozen=True)
class ProcessInfo:
    """A process among the processes of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher such as torchrun started the process."""
    restarts: int = 0
    """How often the launcher has started the processes again."""
    replicas: int = 1
    """Processes that train one network together; neighbours in rank, so on one machine where they
    fit, and networks that are neighbours on the ring are next to each other."""

    @property
    def network(self) -> int:
        """The network that the process trains."""
        return self.rank // self.replicas

    @property
    def networks(self) -> int:
        """Size of the population."""
        return self.world_size // self.replicas

    @property
    def replica(self) -> int:
        """Which of its network's processes this is."""
        return self.rank % self.replicas

    @property
    def is_leader(self) -> bool:
        """Whether the process writes the files of its network."""
        return self.replica == 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files of the whole run."""
        return self.rank == 0

    def __str__(self) -> str:
        """Network, replica where there are several, and rank."""
        replica = f"replica {self.replica}, " if self.replicas > 1 else ""
        return f"network {self.network} ({replica}rank {self.rank} on {socket.gethostname()})"

    def with_replicas(self, replicas: int) -> ProcessInfo:
        """The same place where `replicas` processes train each network.

        Raises: ConfigError when the processes cannot be shared out, naming numbers that work.
        """
        here = self.local_world_size
        if self.world_size % replicas:
            started = "process was" if self.world_size == 1 else "processes were"
            raise ConfigError(
                f"runtime.replicas {replicas} needs {replicas} processes for each network, and "
                f"{self.world_size} {started} started: start {replicas}, {2 * replicas}, "
                f"{3 * replicas} ... (torchrun --nproc-per-node)"
            )
        torn = here % replicas and replicas % here
        if replicas > 1 and (torn or self.world_size % here):
            raise uneven_machines(
                replicas, f"{here} of {self.world_size} processes on this machine"
            )
        return replace(self, replicas=replicas)

    def cpu_share(self) -> int:
        """Cores that the process may count as its own, at least 1.

        Under Slurm at most those of the job's step: where nothing binds a task to its cores
        (TaskPlugin=task/none), it may run on all of the machine's.
        """
        cores = len(os.sched_getaffinity(0))
        allotted = os.environ.get("SLURM_CPUS_ON_NODE", "")
        if allotted.isdecimal():
            cores = min(cores, int(allotted))
        return max(1, cores // self.local_world_size)


def uneven_machines(replicas: int, found: str) -> ConfigError:
    """The error of machines whose numbers of processes do not fit."""
    fill = [str(size) for size in range(1, replicas) if replicas % size == 0]
    smaller = f", or {' or '.join(fill)} where a network fills several machines" if fill else ""
    return ConfigError(
        f"runtime.replicas {replicas} does not fit {found}: start equally many on each machine, "
        f"{replicas}, {2 * replicas}, {3 * replicas} ...{smaller}"
    )


def read_process_info(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; alone without them.

    Raises: StartError when only some are set, or they contradict each other.
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
